"""bench/cluster/fault_campaign.py in its short form, and that it would see harm."""

from __future__ import annotations

from functools import partial

import pytest
import typer
from typer.testing import CliRunner

from bench.cluster import fault_campaign, fault_pair
from bench.cluster.fault_campaign import KINDS, Campaign, Fault, Outcome, campaign, planned, table
from bench.cluster.fault_worker import TEXTS, Job, adapted, precompute
from lpt_fast.cache import activation_cache


@pytest.mark.slow
def test_six_faults():
    """One of each kind, over precompute and training: no row lost, none wrong, the same end."""
    told = []
    outcomes, impossible = campaign(6, seed=0, stop=0.5, tell=told.append)
    assert outcomes == told and len(told) == 6
    assert {outcome.fault.kind for outcome in outcomes} == set(KINDS) - set(impossible)
    assert all(outcome.sound for outcome in outcomes), [o.to_json() for o in outcomes]
    by_kind = {outcome.fault.kind: outcome for outcome in outcomes}
    assert "SIGKILL" in by_kind["killed"].told and by_kind["killed"].starts >= 1
    assert {outcome.fault.job for outcome in outcomes} == {"precompute", "training"}
    assert len(table(outcomes)) == 7


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    precompute(adapted(), Job("precompute", root)).close()
    return root


@pytest.mark.slow
def test_harm_is_seen(built, monkeypatch):
    """Rows that are lost or wrong, hung processes and another end of the training count."""
    rows = fault_pair.rows_of(built)
    assert len(rows) == TEXTS
    assert fault_pair.served(built, rows) == {"equal": TEXTS}
    first, second = list(rows)[:2]
    moved = {**rows, first: rows[first] + 1e-3, b"x" * 16: rows[second]}
    assert fault_pair.served(built, moved) == {"equal": TEXTS - 1, "wrong": 1, "absent": 1}
    # A flipped bit is refused; without the hash of rows it would be served, and counted.
    with activation_cache.ActivationCache.open(fault_pair._only(built)) as opened:
        name = opened.table.names[opened.table.shard[3]]
        place = int(opened.table.offset[3]) + 3
    path = fault_pair._only(built) / name
    with open(path, "r+b") as f:
        f.seek(place)
        byte = f.read(1)[0]
        f.seek(place)
        f.write(bytes([byte ^ 32]))
    assert fault_pair.served(built, rows) == {"equal": TEXTS - 1, "refused": 1}
    with monkeypatch.context() as patch:
        reader = activation_cache.RowReader
        patch.setattr(activation_cache, "RowReader", lambda *args: reader(*args[:4], check="never"))
        assert fault_pair.served(built, rows) == {"equal": TEXTS - 1, "wrong": 1}
    assert fault_pair.mend(built) and not fault_pair.mend(built)
    assert fault_pair.served(built, rows)["absent"] > 0

    fault = planned(1, 0, list(KINDS))[0]
    assert Outcome(fault).sound
    for harm in ({"rows_lost": 1}, {"wrong_rows": 1}, {"hung": 1}, {"same_end": False}):
        assert not Outcome(fault, **harm).sound
    runs = Campaign(built, None, 1.0, end={"losses": [1.0, 2.0], "weights": {"a": [1.0]}})
    end = {"losses": [1.0, 2.0], "weights": {"a": [1.0]}}
    assert runs._same(end) and runs._same({})
    assert not runs._same({**end, "losses": [1.0, 2.0001]})
    assert not runs._same({**end, "losses": [1.0]})
    assert not runs._same({**end, "weights": {"a": [1.1]}})


def test_the_command_ends_with_an_error_where_harm_was_done(monkeypatch, tmp_path):
    app = typer.Typer()
    app.command()(fault_campaign.main)
    fault = Fault("killed", "training", 0.5, 1, 0)

    def pretended(count, seed, stop, tell, lost=0):
        outcomes = [Outcome(fault, rows_lost=lost, told=["SIGKILL"])] * count
        for outcome in outcomes:
            tell(outcome)
        return outcomes, []

    for lost in (0, 2):
        monkeypatch.setattr(fault_campaign, "campaign", partial(pretended, lost=lost))
        out = tmp_path / f"{lost}.jsonl"
        result = CliRunner().invoke(app, ["--faults", "3", "--out", str(out)])
        assert result.exit_code == (1 if lost else 0), result.output
        assert len(out.read_text().splitlines()) == 3
        assert result.output.splitlines()[-1].split()[:4] == [
            "killed",
            "training",
            "3",
            str(3 * lost),
        ]


def test_faults_by_seed():
    a, b = planned(24, 1, list(KINDS)), planned(24, 1, list(KINDS))
    assert a == b != planned(24, 2, list(KINDS))
    assert {(f.kind, f.job) for f in a} == {
        (kind, job) for kind in KINDS for job in fault_campaign.JOBS
    }

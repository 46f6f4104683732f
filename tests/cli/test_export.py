"""`lpt-fast export`."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from lpt_fast.cli import export as export_module
from lpt_fast.cli.inference import Classifier
from lpt_fast.cli.main import app
from tests.small_disk import mounted, stuff

TEXTS = ["a lovely film", "bad", "the plot was dull and what I saw was not good at all"]
ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export_module.NEEDS["onnx"]),
    reason="needs lpt-fast[export]",
)


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def train(models_dir, folder, *more):
    rows = [f"{word} film {i}\t{label}" for i in range(4) for word, label in
            (("good", "fine"), ("bad", "poor"), ("odd", "strange"))]  # fmt: skip
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    done = invoke(
        *("train", "--train_file", folder / "train.tsv", "--output_dir", folder / "out"),
        *("--use_cpu", "--max_steps", 2, "--max_length", 24, "--save_strategy", "no"),
        *("--bottleneck_size", 4, "--generator", "mppg", *more),
    )
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.fixture(scope="module")
def adapter(models_dir, tmp_path_factory):
    return train(models_dir, tmp_path_factory.mktemp("x"), "--model", models_dir / "bert")


def expected(adapter, inputs):
    with torch.no_grad():
        return Classifier(str(adapter), use_cpu=True).model(**inputs).logits


def tokens(adapter, side):
    tokenizer = Classifier(str(adapter), use_cpu=True).tokenizer
    return tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")


@pytest.mark.slow
def test_torch(adapter, tmp_path):
    file = tmp_path / "served.pt2"
    done = invoke("export", "--adapter", adapter, "--format", "torch", "--output_file", file)
    assert done.exit_code == 0, done.output
    assert "logits [batch, 3]" in done.output and "fine" in done.output
    about = {"lpt_fast.json": ""}
    program = torch.export.load(file, extra_files=about).module()
    about = json.loads(about["lpt_fast.json"])
    assert about["labels"] == ["fine", "poor", "strange"] and about["max_length"] == 24
    for side in ("left", "right"):
        inputs = tokens(adapter, side)
        got = program(*(inputs[name] for name in about["inputs"]))
        torch.testing.assert_close(got, expected(adapter, inputs), atol=1e-5, rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["served.pt2"]


@ONNX
@pytest.mark.slow
def test_onnx(adapter):
    import onnxruntime

    done = invoke("export", "--adapter", adapter)
    assert done.exit_code == 0, done.output
    session = onnxruntime.InferenceSession(str(adapter / "model.onnx"))
    assert [i.shape for i in session.get_inputs()] == [["batch", "length"]] * len(
        session.get_inputs()
    )
    about = json.loads(session.get_modelmeta().custom_metadata_map["lpt_fast"])
    assert about["labels"] == ["fine", "poor", "strange"]
    for side in ("left", "right"):
        inputs = tokens(adapter, side)
        feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        got = torch.from_numpy(session.run(["logits"], feed)[0])
        torch.testing.assert_close(got, expected(adapter, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generator", "form"),
    [("none", "torch"), *(pytest.param(g, "onnx", marks=ONNX) for g in ("mppg", "none"))],
)
def test_late_lora(models_dir, tmp_path, generator, form):
    how = ("--model", models_dir / "bert", "--generator", generator, "--learning_rate", "5e-2")
    adapter = train(
        models_dir, tmp_path, *how, "--lora_r", 4, "--lora_target_modules", "all-linear"
    )
    done = invoke("export", "--adapter", adapter, "--format", form)
    assert done.exit_code == 0, done.output
    inputs = tokens(adapter, "left")
    want = expected(adapter, inputs)
    if form == "torch":
        program = torch.export.load(adapter / "model.pt2").module()
        got = program(*(inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")))
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(adapter / "model.onnx"))
        feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        got = torch.from_numpy(session.run(["logits"], feed)[0])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    model = Classifier(str(adapter), use_cpu=True).model
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(p)
    with torch.no_grad():  # what was exported has the updates
        assert not torch.allclose(model(**inputs).logits, want, atol=1e-3)


@pytest.mark.slow
def test_a_full_disk(adapter, tmp_path):
    with mounted(tmp_path / "disk", 1 << 20) as disk:
        stuff(disk, leave=8192)
        before = sorted(disk.iterdir())
        file = disk / "m.pt2"
        said = refused("--adapter", adapter, "--format", "torch", "--output_file", file)
        assert "MB free where" in said and "make room" in said
        assert sorted(disk.iterdir()) == before


@pytest.mark.slow
def test_label_words_are_refused(models_dir, tmp_path):
    (tmp_path / "task.yaml").write_text(
        'name: films\ntext_columns: [text]\ntemplate: "{text} it was {mask}"\n'
        "label_words: {fine: good, poor: bad, strange: film}\n",
        encoding="utf-8",
    )
    how = ("--model", models_dir / "bert-mlm", "--formulation", "cloze")
    out = train(models_dir, tmp_path, *how, "--task", tmp_path / "task.yaml")
    assert "predicts label words, expected one with a head" in refused(
        "--adapter", out, "--format", "torch"
    )


def refused(*args):
    done = invoke("export", *args)
    assert done.exit_code == 2, done.output
    said = "lpt-fast: " + " ".join(done.output.split()).split("lpt-fast: ")[1]
    assert len(said) <= 310 and "Traceback" not in said
    return said


@pytest.mark.slow
def test_what_cannot_be_is_refused_and_leaves_nothing(adapter, models_dir, tmp_path, monkeypatch):
    before = sorted(adapter.iterdir())
    torch_way = ("--adapter", adapter, "--format", "torch")
    assert "is a folder" in refused(*torch_way, "--output_file", tmp_path)
    assert "no folder" in refused(*torch_way, "--output_file", tmp_path / "none" / "m.pt2")
    assert "holds no lpt_run.json" in refused("--adapter", tmp_path, "--format", "torch")
    assert "`--format` must be" in refused("--adapter", adapter, "--format", "tflite")
    assert "`--adapter` is missing" in refused("--format", "torch")
    with monkeypatch.context() as own:
        own.setattr(export_module, "CLOSE", -1.0)  # nothing is as close
        assert "differs from its own by" in refused(*torch_way)
    with monkeypatch.context() as own:
        own.setattr(export_module, "NEEDS", {"onnx": ("no_such_package",)})
        assert "pip install 'lpt-fast[export]'" in refused("--adapter", adapter)
    with monkeypatch.context() as own:

        def breaks(*args, **kwargs):
            raise RuntimeError("one line\nand more of them")

        own.setattr(torch.export, "export", breaks)
        said = refused(*torch_way)
        assert "could not export BertForSequenceClassification (RuntimeError: one line)" in said
    assert sorted(adapter.iterdir()) == before and not list(tmp_path.iterdir())

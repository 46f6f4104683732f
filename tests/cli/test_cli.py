"""The command line end to end on tiny models, and what it says about wrong input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from lpt_fast.cli.arguments import TrainArguments
from lpt_fast.cli.main import underscored
from lpt_fast.cli.settings import merge
from tests.cli.cases import GOOD, ROWS, invoke, refused, write_tsv
from tests.tiny import tiny

SPEED = ["--use_cpu", "--num_train_epochs", "1", "--save_strategy", "no", "--bottleneck_size", "8"]


def run_train(models_dir, data, out, *more, model="bert"):
    result = invoke(
        *(
            "train",
            "--model",
            models_dir / model,
            "--train_file",
            data["train"],
            "--output_dir",
            out,
        ),
        *("--test_file", data["test"], *SPEED, *more),
    )
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["npg", "mppg"])
def test_train_eval_predict(models_dir, data, tmp_path, generator):
    out = tmp_path / "out"
    shown = run_train(
        models_dir, data, out, "--generator", generator, "--insertion_layer", 3,
        "--num_train_epochs", 8, "--learning_rate", "5e-3", "--validation_file", data["test"],
    ).output  # fmt: skip
    assert "validation" in shown and "accuracy" in shown and f"--adapter {out}" in shown
    results = json.loads((out / "results.json").read_text())
    assert results["insertion_layer"] == 3 and results["generator"] == generator
    assert results["train_examples"] == len(ROWS)
    assert (out / "adapter_model.safetensors").is_file() and (out / "lpt_run.json").is_file()

    evaluated = invoke("eval", "--adapter", out, "--test_file", data["test"], "--use_cpu")
    assert evaluated.exit_code == 0, evaluated.output
    assert f"{100 * results['test']['accuracy']:.1f} %" in evaluated.output

    texts = [text for text, _ in ROWS[:8]]
    from_stdin = invoke("predict", "--adapter", out, "--use_cpu", text="\n".join(texts) + "\n")
    assert from_stdin.exit_code == 0, from_stdin.output
    lines = [line.split("\t") for line in from_stdin.stdout.splitlines()]
    assert lines[0] == ["text", "label", "probability", "p(negative)", "p(positive)"]
    assert [line[0] for line in lines[1:]] == texts
    right = sum(line[1] == label for line, (_, label) in zip(lines[1:], ROWS[:8], strict=True))
    assert right / 8 == results["test"]["accuracy"]
    for line in lines[1:]:
        assert abs(float(line[3]) + float(line[4]) - 1) < 1e-3

    target = tmp_path / "predictions.jsonl"
    done = invoke(
        *("predict", "--adapter", out, "--input_file", data["test"], "--output_file", target),
        *("--output_format", "jsonl", "--use_cpu", "--per_device_eval_batch_size", 3),
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["label"] for row in rows] == [line[1] for line in lines[1:]]
    assert [row["text"] for row in rows] == texts
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["head", "lora", "prompt_tuning", "full"])
def test_other_methods(models_dir, data, tmp_path, method):
    out = tmp_path / "out"
    run_train(models_dir, data, out, "--method", method)
    results = json.loads((out / "results.json").read_text())
    evaluated = invoke("eval", "--adapter", out, "--test_file", data["test"], "--use_cpu")
    assert evaluated.exit_code == 0, evaluated.output
    assert f"{100 * results['test']['accuracy']:.1f} %" in evaluated.output
    trains = results["trainable_parameters"] == results["parameters"]
    assert trains == (method == "full")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["bert-mlm", "gpt2"])
def test_cloze(models_dir, data, tmp_path, model):
    """Label words instead of a head, at the mask or as the next token: it learns them."""
    task = tmp_path / "task.yaml"
    task.write_text(
        "name: films\ntext_columns: [text]\ntemplate: '{text} . It was {mask} .'\n"
        "decoder_template: '{text} . It was'\nlabel_words: {positive: great, negative: terrible}\n"
    )
    out = tmp_path / "out"
    run_train(
        models_dir, data, out, "--formulation", "cloze", "--task", task, "--num_train_epochs", 25,
        "--learning_rate", "1e-2", model=model,
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    # Full-vocabulary loss, well below that of guessing. (A tiny random model cannot bring it near
    # zero.)
    assert results["test"]["loss"] < {"bert-mlm": 10.33, "gpt2": 6.69}[model] - 0.8
    saved = json.loads((out / "adapter_config.json").read_text())
    assert saved["task_type"] == (None if model == "bert-mlm" else "CAUSAL_LM")
    assert results["trainable_parameters"] < 0.1 * results["parameters"]
    evaluated = invoke("eval", "--adapter", out, "--test_file", data["test"], "--use_cpu")
    assert f"{100 * results['test']['accuracy']:.1f} %" in evaluated.output, evaluated.output
    text = "\n".join(text for text, _ in ROWS[:8])
    predicted = invoke("predict", "--adapter", out, "--use_cpu", text=text)
    labels = [line.split("\t")[1] for line in predicted.stdout.splitlines()[1:]]
    right = sum(a == label for a, (_, label) in zip(labels, ROWS[:8], strict=True))
    assert right / 8 == results["test"]["accuracy"]


@pytest.mark.slow
def test_folder_with_splits_and_few_shot(models_dir, tmp_path):
    folder = tmp_path / "task"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("dev", ROWS[:6]), ("test", ROWS[6:16])):
        write_tsv(folder / f"{split}.tsv", rows)
    call = ["train", "--model", models_dir / "bert", "--dataset", folder, *SPEED]
    done = invoke(*call, "--output_dir", tmp_path / "a", "--max_eval_samples", 4)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["validation"]["examples"] == results["test"]["examples"] == 4
    done = invoke(*call, "--output_dir", tmp_path / "b", "--few_shot", 10, "--seed", 13)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert results["train_examples"] == 10 and results["validation"]["examples"] == 10


@pytest.mark.slow
def test_resume(models_dir, data, tmp_path):
    out = tmp_path / "out"
    call = (models_dir, data, out, "--num_train_epochs", "2", "--save_strategy", "epoch")
    assert "no checkpoint" in refused(
        *("train", "--model", models_dir / "bert", "--train_file", data["train"]),
        *("--output_dir", out, "--resume_from_checkpoint", "last"),
    )
    run_train(*call)
    first = (out / "adapter_model.safetensors").read_bytes()
    run_train(*call, "--resume_from_checkpoint", "last")
    assert (out / "adapter_model.safetensors").read_bytes() == first
    assert "is no checkpoint" in refused(
        *("train", "--model", models_dir / "bert", "--train_file", data["train"]),
        *("--output_dir", out, "--resume_from_checkpoint", tmp_path),
    )


# -- settings --------------------------------------------------------------------------------------


def test_config_file_with_flags_on_top(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: m\ntrain_file: f\nlearning_rate: 2e-3\nbf16: true\nseed: 7\nmax_steps: '5'\n"
    )
    args = merge(TrainArguments, str(path), {"seed": 9, "bf16": None})
    assert (args.learning_rate, args.bf16, args.seed, args.max_steps) == (2e-3, True, 9, 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learing_rate: 1", "unknown key `learing_rate`; did you mean `learning_rate`?"),
        ("zzzz: 1", "unknown key `zzzz`; known keys are"),
        ("seed: many", "`seed` must be of type int, got 'many'"),
        ("seed: 1.5", "`seed` must be of type int, got 1.5"),
        ("bf16: maybe", "`bf16` must be of type bool, got 'maybe'"),
        ("model: [a]", "`model` must be of type str"),
        ("- a\n- b", "must hold `key: value` lines, got a list"),
        ("a: [", "is no valid YAML"),
    ],
)
def test_wrong_config_files(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    assert message in refused("train", "--config", path)


@pytest.mark.slow
def test_flags_that_cannot_work(models_dir, data):
    base = ["train", "--model", models_dir / "bert", "--train_file", data["train"]]
    assert "`--model` is missing" in refused("train", "--train_file", data["train"])
    assert "nothing to train on" in refused("train", "--model", "m")
    assert "`--method` must be one of lpt, head" in refused(*base, "--method", "lora2")
    assert "`generator` must be one of static" in refused(*base, "--generator", "lstm")
    assert "`insertion_layer` must be between 1 and 3" in refused(*base, "--insertion_layer", 4)
    assert "goes with --method lpt" in refused(*base, "--formulation", "cloze", "--method", "full")
    assert "needs a template" in refused(*base, "--formulation", "cloze")
    assert "needs validation data" in refused(*base, "--load_best_model_at_end")
    assert "`--max_length` must be at least 1, got 0" in refused(*base, "--max_length", 0)
    assert "takes 64 tokens" in refused(*base, "--max_length", 65)
    message = refused(*base, "--few_shot", 8, "--validation_file", data["test"])
    assert "`--few_shot` draws its own" in message
    assert "leaves no room for text" in refused(*base, "--max_length", 2)
    assert "not installed here" in refused(*base, "--report_to", "wandb")
    message = refused(*base, "--formulation", "cloze", "--task", "sst2")
    assert "has no language model head" in message
    assert "no configuration file" in refused("train", "--config", "nowhere.yaml")
    assert "sst2" in refused(*base, "--task", "sst")
    assert invoke("train", "--no_such_flag").exit_code == 2
    assert underscored(["--train-file", "a-b", "--output-dir=x-y", "-h"]) == [
        *("--train_file", "a-b", "--output_dir=x-y", "-h")
    ]


# -- data and models that cannot work --------------------------------------------------------------


def test_wrong_data(models_dir, data, tmp_path):
    def call(**files):
        files = {"train_file": data["train"], **files}
        flags = [part for name, value in files.items() for part in (f"--{name}", value)]
        # A short max_length: the tiny models have 64 positions.
        return refused("train", "--model", models_dir / "bert", "--max_length", 32, *SPEED, *flags)

    assert "nowhere.tsv" in call(train_file=tmp_path / "nowhere.tsv")
    (tmp_path / "empty.tsv").write_text("")
    assert "empty.tsv" in call(train_file=tmp_path / "empty.tsv")
    assert "no rows" in call(train_file=write_tsv(tmp_path / "header.tsv", []))
    assert "'review'" in call(text_column="review")
    assert "'gold'" in call(label_column="gold")
    unseen = write_tsv(tmp_path / "unseen.tsv", [*ROWS[:2], ("so so", "neutral")])
    message = call(test_file=unseen)
    assert "'neutral'" in message and "negative" in message and "3" in message
    assert "expected at least 2" in call(
        train_file=write_tsv(tmp_path / "one.tsv", [("a", "x"), ("b", "x")])
    )
    (tmp_path / "data.xml").write_text("<a/>")
    assert ".tsv" in call(train_file=tmp_path / "data.xml")


@pytest.mark.slow
def test_a_text_of_ten_thousand_words(models_dir, data, tmp_path):
    long = write_tsv(tmp_path / "long.tsv", [*ROWS, ("word " * 10_000, "positive")])
    run_train(models_dir, {**data, "train": long}, tmp_path / "out", "--max_length", "32")
    predicted = invoke("predict", "--adapter", tmp_path / "out", "--use_cpu", text="word " * 10_000)
    assert predicted.exit_code == 0 and len(predicted.stdout.splitlines()) == 2


@pytest.mark.slow
def test_tokenizers_without_mask_or_pad(models_dir, data, tmp_path):
    call = ["train", "--train_file", data["train"], "--task", "sst2", *SPEED, "--max_length", 32]
    assert "neither a pad token nor an end token" in refused(
        *call, "--model", models_dir / "gpt2-no-end"
    )
    folder = tmp_path / "no-mask"
    tiny("bert", "MASKED_LM", vocab_size=900).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "gpt2")
    tokenizer.save_pretrained(folder)
    message = refused(*call, "--model", folder, "--formulation", "cloze")
    assert "mask token" in message
    # A decoder's end token serves for padding.
    ok = invoke(*call, "--model", models_dir / "gpt2", "--output_dir", tmp_path / "gpt2")
    assert ok.exit_code == 0, ok.output


@pytest.mark.slow
def test_models_that_cannot_be_loaded(models_dir, data, tmp_path):
    call = ["train", "--train_file", data["train"]]
    message = refused(*call, "--model", tmp_path / "nowhere")
    assert "no such local folder" in message
    assert "holds no lpt_run.json" in refused(
        "eval", "--adapter", tmp_path, "--test_file", data["test"]
    )
    assert "holds no lpt_run.json" in refused("predict", "--adapter", tmp_path / "x")
    for command in ("predict", "eval"):
        base = (command, "--adapter", tmp_path / "x")
        said = refused(*base, "--per_device_eval_batch_size", 0)
        assert "`--per_device_eval_batch_size` must be at least 1, got 0" in said
        assert "must be one of float32, bfloat16" in refused(*base, "--compute_dtype", "int8")
    run_train(models_dir, data, tmp_path / "out")
    other = refused(
        *("eval", "--adapter", tmp_path / "out", "--test_file", data["test"], "--use_cpu"),
        *("--model", models_dir / "bert-small"),
    )
    assert "does not fit the model" in other and "bert-small" in other
    gone = refused(
        *("eval", "--adapter", tmp_path / "out", "--test_file", data["test"]),
        *("--model", tmp_path / "moved"),
    )
    assert "--model" in gone
    message = refused("predict", "--adapter", tmp_path / "out", "--use_cpu", text="a\n\nb\n")
    assert "Line 2 of standard input is empty" in message
    assert "held no text" in refused(
        "predict", "--adapter", tmp_path / "out", "--use_cpu", text="\n\n"
    )
    assert "no folder" in refused(
        *("predict", "--adapter", tmp_path / "out", "--input_file", data["test"], "--use_cpu"),
        *("--output_file", tmp_path / "missing" / "x.tsv"),
    )


# -- the rest --------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lpt_fast, lpt_fast.cli\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'numpy', 'pandas'} "
        "& set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_second_training_in_the_same_folder(models_dir, data, tmp_path):
    """What is evaluated is what was trained last, not what an earlier adapter left there."""
    out = tmp_path / "out"
    for method in ("lpt", "full", "lpt"):
        run_train(models_dir, data, out, "--method", method, "--num_train_epochs", "3")
        results = json.loads((out / "results.json").read_text())
        assert (out / "adapter_config.json").is_file() == (method == "lpt")
        assert (out / "config.json").is_file() == (method == "full")
        shown = invoke("eval", "--adapter", out, "--test_file", data["test"], "--use_cpu").output
        assert f"{100 * results['test']['accuracy']:.1f} %" in shown


@pytest.mark.slow
def test_training_rows_are_no_validation(models_dir, data, tmp_path):
    from datasets import Dataset

    saved = tmp_path / "saved"
    texts, labels = zip(*ROWS, strict=True)
    Dataset.from_dict({"text": list(texts), "label": list(labels)}).save_to_disk(str(saved))
    for source in (data["train"], saved):
        out = tmp_path / "out"
        call = ["train", "--model", models_dir / "bert", "--dataset", source, "--output_dir", out]
        done = invoke(*call, *SPEED)
        assert done.exit_code == 0, done.output
        results = json.loads((out / "results.json").read_text())
        assert "validation" not in results and "test" not in results


@pytest.mark.slow
def test_half_precision_is_remembered(models_dir, data, tmp_path):
    out = tmp_path / "out"
    run_train(models_dir, data, out, "--torch_dtype", "bfloat16")
    from lpt_fast.cli.inference import Classifier

    model = Classifier(str(out), use_cpu=True).model
    assert model.get_base_model().bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16


def test_env():
    shown = invoke("env").output
    assert (
        f"torch            {torch.__version__}"[:5] in shown and "peft" in shown and "GPU" in shown
    )


@pytest.mark.slow
def test_predict_pairs_from_stdin(models_dir, tmp_path, monkeypatch):
    rows = [(a, b, str(int(a == b))) for a in GOOD for b in GOOD]
    path = write_tsv(tmp_path / "pairs.tsv", rows, header="one\ttwo\tlabel")
    out = tmp_path / "out"
    run_train(models_dir, {"train": path, "test": path}, out, "--text_column", "one,two")
    ok = invoke("predict", "--adapter", out, "--use_cpu", text="a film\tthe plot\n")
    assert ok.exit_code == 0, ok.output
    assert ok.stdout.splitlines()[0].split("\t")[:3] == ["one", "two", "label"]
    assert "Line 1 of standard input has 1" in refused(
        "predict", "--adapter", out, "--use_cpu", text="alone\n"
    )

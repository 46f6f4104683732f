"""Several adapters' labels in one pass: what each adapter gives by itself."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lpt_fast import predict_all
from lpt_fast.cli.all_tasks import Classifiers, named
from lpt_fast.cli.inference import Classifier, tokens_on
from lpt_fast.method import one_pass, packed_lower
from lpt_fast.packed import prepacked
from lpt_fast.packed.prepacked import Prepacked
from tests.adapters import lpt
from tests.cli.cases import ROWS, invoke, refused, write_tsv
from tests.cli.test_cli import run_train
from tests.tiny import LAYERS

THREE = [(text, "abc"[i % 3]) for i, (text, _) in enumerate(ROWS)]
TEXTS = [text for text, _ in ROWS[:10]] + ["a film", "great great great acting and a dull plot"]
ALL = ("--lora_r", 2, "--lora_target_modules", "all-linear")


@pytest.fixture(scope="module")
def trained(models_dir, tmp_path_factory):
    """Folders of trainings: two layers, three generators, two and three labels."""
    root = tmp_path_factory.mktemp("trained")
    data = {"train": write_tsv(root / "two.tsv"), "test": write_tsv(root / "test.tsv", ROWS[:8])}
    three = {"train": write_tsv(root / "three.tsv", THREE), "test": data["test"]}
    more = ("--learning_rate", "5e-2", "--prompt_dropout", 0)
    made = {}
    for name, rows, flags in (
        ("films", data, ("--insertion_layer", 3)),
        ("letters", three, ("--insertion_layer", 2, "--generator", "npg", "--max_length", 9)),
        ("updated", data, ("--insertion_layer", 2, "--num_virtual_tokens", 4, *ALL)),
        ("again", three, ("--insertion_layer", 2)),
    ):
        rows = {**rows, "test": rows["train"]}
        run_train(models_dir, rows, root / name, *flags, *more)
        made[name] = str(root / name)
    return made


def single(folder, texts=TEXTS, **how):
    return Classifier(folder, use_cpu=True, **how).probabilities({"text": texts})


@pytest.mark.slow
def test_each_adapter_gives_what_it_gives_alone(trained):
    found = predict_all(list(trained.values()), TEXTS, use_cpu=True, compute_dtype="float32")
    assert list(found) == list(trained)
    for name, folder in trained.items():
        expected = single(folder, compute_dtype="float32")
        labels = Classifier(folder, use_cpu=True).labels
        got = np.array([list(row["probabilities"].values()) for row in found[name]])
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.ptp(expected[:, 0]) > 1e-3
        for row, p in zip(found[name], expected, strict=True):
            assert row["label"] == labels[p.argmax()] and list(row["probabilities"]) == labels
            assert row["probability"] == max(row["probabilities"].values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_a_cache_and_in_bf16(trained, tmp_path, dtype):
    names = ("films", "letters", "updated")
    folders = {name: trained[name] for name in names}
    how = {"use_cpu": True, "compute_dtype": dtype}
    text = Classifiers(folders, **how).probabilities({"text": TEXTS})
    loaded = Classifiers(folders, activation_cache=str(tmp_path / "cache"), **how)
    first = loaded.probabilities({"text": TEXTS[:7]})
    again = loaded.probabilities({"text": TEXTS})
    # ("letters" cuts one of them.)
    assert len(loaded._opened([0, 2])) == len(set(TEXTS)) + 1
    assert len(loaded._opened([0])) == 0  # layer 3, above the lowest
    atol = 3e-2  # (rows of a cache are bf16)
    for name in names:
        np.testing.assert_allclose(again[name], text[name], atol=atol)
        np.testing.assert_allclose(again[name][:7], first[name], atol=1e-2)
        expected = single(trained[name], compute_dtype="float32")
        np.testing.assert_allclose(again[name], expected, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_adapter_from_the_embeddings_on(trained, monkeypatch, dtype):
    """No layer pads, and in bf16 the frozen weights of all of them are arranged once."""
    arranges = dtype == "bfloat16" and prepacked.known()
    asked, products = [], []
    lower, product = packed_lower.run_lower, Prepacked.forward
    monkeypatch.setattr(packed_lower, "run_lower", lambda *a: asked.append(a[2]) or lower(*a))
    monkeypatch.setattr(Prepacked, "forward", lambda *a: products.append(id(a[0])) or product(*a))
    got = single(trained["films"], compute_dtype=dtype)
    assert asked == [0]
    if arranges:
        # Six matrices of each layer; the last one's keys and values are not made.
        assert len(set(products)) == len(products) == 6 * LAYERS - 2
    else:
        assert not products
    np.testing.assert_allclose(got, single(trained["films"], compute_dtype="float32"), atol=3e-2)


@pytest.mark.slow
def test_lower_layers_run_each_text_once(trained, monkeypatch):
    """And layer k+1 projects a text's rows once for the tasks that share it."""
    loaded = Classifiers([trained["again"], trained["updated"]], use_cpu=True)
    lower, projected, project = [], [], one_pass.project_first
    loaded.late.backbone.encoder.layer[0].register_forward_pre_hook(
        lambda m, args: lower.append(len(args[0]))
    )
    monkeypatch.setattr(
        one_pass, "project_first", lambda *a: projected.append(len(a[3])) or project(*a)
    )
    loaded.probabilities({"text": TEXTS})
    tokens = sum(len(ids) for ids in loaded.tokenizer(TEXTS)["input_ids"])
    assert lower == [len(TEXTS)] and projected == [tokens]


@pytest.mark.slow
def test_a_model_with_its_adapters(models_dir):
    torch.manual_seed(0)
    from peft import get_peft_model

    names = {0: "no", 1: "yes"}
    base = AutoModelForSequenceClassification.from_pretrained(
        models_dir / "bert", id2label=names, label2id={"no": 0, "yes": 1}
    )
    config = {"task_type": "SEQ_CLS", "insertion_layer": 2, "prompt_dropout": 0.0}
    model = get_peft_model(base, lpt(**config))
    model.add_adapter("other", lpt(**{**config, "insertion_layer": 1}))
    tokenizer = AutoTokenizer.from_pretrained(models_dir / "bert")
    found = predict_all(model, TEXTS, tokenizer=tokenizer, batch_size=5)
    assert list(found) == ["default", "other"]
    for name, rows in found.items():
        model.set_adapter(name)
        with torch.no_grad():
            for text, row in zip(TEXTS, rows, strict=True):
                p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
                assert row["probability"] == pytest.approx(float(p.max()), abs=1e-5)
                assert row["label"] == names[int(p.argmax())]
    assert predict_all(model, [], tokenizer=tokenizer) == {"default": [], "other": []}
    with pytest.raises(ValueError, match="is one text, expected a list"):
        predict_all(model, "a film", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("device", "free_gib", "width", "size", "expected"),
    [
        ("cpu", 64, 768, 4, 4096),
        ("mps", 64, 768, 4, 4096),
        ("cuda", 64, 768, 4, 32768),
        ("cuda", 4, 1024, 4, 16384),  # 2 GiB of 32 x 1,024 x 4 bytes
        ("cuda", 4, 4096, 2, 8192),
        ("cuda", 0, 4096, 2, 4096),  # which is tried in any case
    ],
)
def test_tokens_of_a_batch(device, free_gib, width, size, expected, monkeypatch):
    """By the device, and on a GPU by what is free there."""
    weight = SimpleNamespace(device=torch.device(device), element_size=lambda: size)
    model = SimpleNamespace(
        parameters=lambda: iter([weight]), config=SimpleNamespace(hidden_size=width)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (free_gib << 30, 80 << 30))
    assert tokens_on(model) == expected


@pytest.mark.slow
def test_the_command_line(trained, tmp_path):
    flags = [x for name in ("films", "letters") for x in ("--adapter", trained[name])]
    text = "\n".join(TEXTS) + "\n"
    done = invoke("predict", *flags, "--use_cpu", "--compute_dtype", "float32", text=text)
    assert done.exit_code == 0, done.output
    header, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["text", "films", "letters", "p(films)", "p(letters)"]
    expected = {name: single(trained[name], compute_dtype="float32") for name in header[1:3]}
    for i, line in enumerate(lines):
        assert line[0] == TEXTS[i] and line[2] in "abc"
        for column, name in ((3, "films"), (4, "letters")):
            assert float(line[column]) == pytest.approx(expected[name][i].max(), abs=1e-4)
    out = tmp_path / "out.jsonl"
    config = tmp_path / "predict.yaml"
    config.write_text(f"adapter:\n- {trained['films']}\n- {trained['letters']}\nuse_cpu: true\n")
    done = invoke(
        *("predict", "--config", config, "--compute_dtype", "float32", "--output_file", out),
        *("--output_format", "jsonl", "--activation_cache", tmp_path / "cache"),
        text=text,
    )
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["tasks"]["films"]["label"] for row in rows] == [line[1] for line in lines]
    assert list(rows[0]["tasks"]["letters"]["probabilities"]) == ["a", "b", "c"]
    # One adapter from a cache: the output of one.
    done = invoke(
        *("predict", "--adapter", trained["letters"], "--activation_cache", tmp_path / "cache"),
        *("--use_cpu", "--compute_dtype", "float32"),
        text=text,
    )
    assert done.stdout.splitlines()[0] == "text\tlabel\tprobability\tp(a)\tp(b)\tp(c)"
    assert [line.split("\t")[1] for line in done.stdout.splitlines()[1:]] == [x[2] for x in lines]


@pytest.mark.slow
def test_cloze(models_dir, data, tmp_path):
    """Each task has its own template; they share the model."""
    folders = []
    for name, template in (("one", "{text} . It was {mask} ."), ("two", "{mask} ! {text}")):
        task = tmp_path / f"{name}.yaml"
        task.write_text(
            f"name: films\ntext_columns: [text]\ntemplate: '{template}'\n"
            "decoder_template: '{text} . It was'\n"
            "label_words: {positive: great, negative: terrible}\n"
        )
        flags = ("--formulation", "cloze", "--task", task)
        run_train(models_dir, data, tmp_path / name, *flags, model="bert-mlm")
        folders.append(str(tmp_path / name))
    found = Classifiers(folders, use_cpu=True).probabilities({"text": TEXTS})
    for folder, got in zip(folders, found.values(), strict=True):
        np.testing.assert_allclose(got, single(folder), atol=1e-5)


@pytest.mark.slow
def test_what_is_refused(trained, models_dir, data, tmp_path):
    films = trained["films"]
    run_train(models_dir, data, tmp_path / "small", "--insertion_layer", 2, model="bert-small")
    run_train(models_dir, data, tmp_path / "lora", "--method", "lora")

    def said(*folders, more=()):
        flags = [x for folder in folders for x in ("--adapter", folder)]
        return refused("predict", *flags, "--use_cpu", *more, text="a film\n")

    message = said(films, tmp_path / "small")
    assert f"{tmp_path / 'small'} was trained on {models_dir / 'bert-small'}" in message
    assert f"expected {models_dir / 'bert'}, the base model of {films}" in message
    message = said(films, tmp_path / "small", more=("--model", models_dir / "bert"))
    assert f"The adapter in {tmp_path / 'small'} does not fit the model" in message
    assert "a training of --method lora, expected late prompts" in said(films, tmp_path / "lora")
    assert f"{tmp_path} holds no lpt_run.json" in said(films, tmp_path)
    assert "is named twice" in said(films, films)
    assert "`--adapter` is missing" in refused("predict", text="a film\n")
    rows = write_tsv(tmp_path / "rows.tsv", header="films\tlabel")
    more = ("--input_file", rows, "--text_column", "films")
    assert "the text column 'films'" in said(films, trained["letters"], more=more)


def test_names():
    assert named(["out/a", "out/b"]) == {"a": "out/a", "b": "out/b"}
    assert named(["x/a", "y/a"]) == {"x/a": "x/a", "y/a": "y/a"}
    assert named({"one": "x/a"}) == {"one": "x/a"}
    with pytest.raises(ValueError, match="No adapter is named"):
        named([])

"""Task table and user tasks: the paper's facts, and one clear sentence for every mistake."""

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from lpt_fast.tasks import TASKS, TaskSpec, load_task

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

GOOD = {
    "name": "mail",
    "text_columns": "[subject, body]",
    "template": '"{subject} : {body} This is {mask} ."',
    "decoder_template": '"{subject} : {body} This is"',
    "label_words": "{0: good, spam: bad}",
    "metric": "accuracy",
}


def write(path, **changes):
    lines = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()), encoding="utf-8")
    return path


def test_the_ten_tasks_of_the_paper():
    singles = ["sst2", "mpqa", "mr", "subj", "trec"]
    assert list(TASKS) == [*singles, "mnli", "mrpc", "qnli", "qqp", "rte"]
    assert TASKS["sst2"].template == "{text} . It was {mask} ."
    assert TASKS["trec"].template == "{mask} : {text}"
    assert TASKS["qqp"].template == "{sentence1} {mask} , {sentence2}"
    assert TASKS["rte"].template == "{sentence1} ? {mask} , {sentence2}"
    assert TASKS["trec"].label_words["abbreviation"] == "Expression"
    assert TASKS["mnli"].labels == ["entailment", "neutral", "contradiction"]
    # F1 counts class 1.
    assert TASKS["mrpc"].labels[1] == "equivalent" and TASKS["qqp"].labels[1] == "duplicate"
    for spec in TASKS.values():
        if spec.hub_label_ids is not None:
            assert [spec.hub_label_ids[i] for i in range(len(spec.labels))] == spec.labels


def test_specs_travel_to_workers():
    spec = TASKS["mnli"]
    assert pickle.loads(pickle.dumps(spec)) == spec and {spec: 1}[TASKS["mnli"]] == 1
    assert dataclasses.asdict(spec)["label_words"] == spec.label_words
    words = {"a": "x", "b": "y"}
    own = TaskSpec("t", ("text",), "{text} {mask}", words)
    words["c"] = "z"
    assert own.labels == ["a", "b"]


@pytest.mark.parametrize("name", ["sst2", "mpqa", "mr", "subj", "trec"])
def test_labels_are_those_of_the_data(name):
    if not DATA.is_dir():
        pytest.skip("no shared data here")
    lines = (DATA / name / "train.tsv").read_text(encoding="utf-8").split("\n")[1:]
    found = {line.split("\t")[1] for line in lines if line}
    assert found == set(TASKS[name].labels)


def test_hub_columns_are_known():
    mnli = TASKS["mnli"]
    assert mnli.resolve_columns(["premise", "hypothesis", "label", "idx"]) == {
        "sentence1": "premise",
        "sentence2": "hypothesis",
    }
    assert mnli.fields({"sentence1": "a", "sentence2": "b"}) == {"sentence1": "a", "sentence2": "b"}
    assert TASKS["qnli"].resolve_columns(["question", "sentence"])["sentence2"] == "sentence"
    with pytest.raises(ValueError, match=r"'a'.*expected.*premise.*rename"):
        mnli.resolve_columns(["a", "premise"])
    with pytest.raises(ValueError, match="got None in column 'sentence'"):
        TASKS["sst2"].fields({"sentence": None})


def test_load_task_by_name_and_unknown_name():
    assert load_task("SST2") is TASKS["sst2"]
    with pytest.raises(ValueError, match=r"'sst-2'.*did you mean 'sst2'.*trec.*\.yaml"):
        load_task("sst-2")


def test_own_task_from_yaml(tmp_path):
    spec = load_task(write(tmp_path / "t.yaml"))
    assert spec.text_columns == ("subject", "body")
    assert dict(spec.label_words) == {"0": "good", "spam": "bad"}
    assert load_task(str(write(tmp_path / "t.yml", decoder_template=None))).decoder_template is None
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load_task(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": "f1"}, r"unknown key 'metrics'.*did you mean 'metric'"),
        ({"template": None, "label_words": None}, "no template and no label_words"),
        ({"template": '"{subject} {body} {mask} {extra}"'}, r"\{extra\}.*\['subject', 'body'\]"),
        ({"template": '"{subject} {body}"'}, r"0 \{mask\}.*exactly one"),
        ({"template": '"{subject} {mask} {body} {mask}"'}, r"2 \{mask\}.*exactly one"),
        ({"template": '"{subject} {mask}"'}, r"\{body\} 0 times"),
        ({"template": '"{subject} {body} {mask"'}, "cannot be parsed"),
        ({"template": '"{subject!r} {body} {mask}"'}, r"\{subject\} with a format"),
        ({"template": "5"}, "got 5 for template"),
        ({"decoder_template": '"{subject} {body} {mask}"'}, r"1 \{mask\} in the decoder_template"),
        ({"decoder_template": '"{subject} {body} is "'}, "space at its end"),
        ({"label_words": "{a: Yes, b: good}"}, "got 'a': True.*quotes"),
        ({"label_words": "{no: bad, b: good}"}, "got False: 'bad'.*quotes"),
        ({"label_words": "{a: good}"}, r"1 label word\(s\)"),
        ({"label_words": '{a: " good", b: bad}'}, "without spaces around"),
        ({"label_words": "[good, bad]"}, "expected a mapping"),
        ({"text_columns": "[a, b, c]"}, "one or two"),
        ({"text_columns": "[mask]"}, "'mask'.*rename"),
        ({"text_columns": "5"}, "text_columns 5"),
        ({"metric": "bleu"}, "'bleu', expected one of accuracy"),
        ({"name": "[unclosed"}, "no YAML"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_task(write(tmp_path / "t.yaml", **changes))
    assert "\n" not in str(caught.value)


def test_yaml_that_is_no_mapping(tmp_path):
    (tmp_path / "t.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="got a list"):
        load_task(tmp_path / "t.yaml")


def test_literal_braces_stay():
    words = {"a": "x", "b": "y"}
    spec = TaskSpec("t", ("text",), "{{x}} {text} {mask}", words)
    assert spec.template == "{{x}} {text} {mask}"


def test_import_is_light():
    code = (
        "import sys, lpt_fast.tasks.templates, lpt_fast.tasks.cloze, lpt_fast.tasks.readers\n"
        "import lpt_fast.tasks.fewshot, lpt_fast.tasks.metrics, lpt_fast.tasks.files\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    # lpt_fast itself may import torch; only what the tasks add is looked at.
    code = (
        "import sys, types; p = types.ModuleType('lpt_fast'); "
        f"p.__path__ = [{str(ROOT / 'lpt_fast')!r}]; sys.modules['lpt_fast'] = p\n" + code
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Few-shot samples keep the proportions of the data; metrics agree with their definitions."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lpt_fast.tasks import FEW_SHOT_SEEDS, classification_metrics, few_shot_split, read_split
from lpt_fast.tasks.fewshot import proportional_counts

datasets = pytest.importorskip("datasets")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def data(**counts):
    labels = [label for label, n in counts.items() for _ in range(n)]
    return datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(len(labels))], "y": labels})


def test_proportions_sizes_and_disjoint():
    full = data(a=600, b=300, c=100)
    train, dev = few_shot_split(full, 50, 13, "y", dev_size="same")
    assert Counter(train["y"]) == Counter(dev["y"]) == {"a": 30, "b": 15, "c": 5}
    assert not set(train["text"]) & set(dev["text"])


def test_default_dev_size_is_a_thousand_where_there_are():
    assert len(few_shot_split(data(a=600, b=500), 100, 13, "y")[1]) == 1_000
    assert len(few_shot_split(data(a=600, b=499), 100, 13, "y")[1]) == 100
    assert len(few_shot_split(data(a=600, b=499), 100, 13, "y", 7)[1]) == 7


def test_deterministic_and_seeds_differ():
    full = data(a=300, b=200)
    draws = [few_shot_split(full, 20, seed, "y", 30)[0]["text"][:] for seed in FEW_SHOT_SEEDS]
    assert FEW_SHOT_SEEDS == (13, 21, 42, 87, 100)
    assert len({tuple(d) for d in draws}) == 5
    # The same training sample for every size of the development set.
    assert few_shot_split(full, 20, 13, "y", 400)[0]["text"][:] == draws[0]


def test_every_class_is_there_and_everything_can_be_used():
    full = data(a=990, b=6, c=4)
    train, _ = few_shot_split(full, 3, 13, "y", "same")
    assert Counter(train["y"]) == {"a": 1, "b": 1, "c": 1}
    assert len(few_shot_split(full, 2, 13, "y", "same")[0]) == 2
    train, dev = few_shot_split(full, 998, 13, "y", 2)
    assert len(train) == 998 and len(dev) == 2
    train, dev = few_shot_split(data(a=3, b=3), 3, 13, "y", "same")
    assert len(set(train["text"]) | set(dev["text"])) == 6


@pytest.mark.parametrize("total", range(0, 31))
def test_proportional_counts(total):
    sizes = [20, 7, 2, 1]
    counts = proportional_counts(sizes, total)
    assert sum(counts) == total and all(c <= s for c, s in zip(counts, sizes, strict=True))
    if total >= 4:
        assert min(counts) >= 1
    # A class with nothing left gives nothing.
    if total <= 9:
        limited = proportional_counts(sizes, total, limits=[2, 6, 0, 1])
        assert sum(limited) == total and limited[2] == 0 and limited[0] <= 2


@pytest.mark.parametrize(
    ("k", "dev_size", "message"),
    [
        (11, None, "k=11 for 10 examples"),
        (6, None, "k=6 and a development set of 6 for 10"),
        (4, 7, "k=4 and a development set of 7"),
        (0, None, "k=0"),
        (2.5, None, "k=2.5"),
        (2, -1, "dev_size=-1.*'same'"),
        (2, "all", "dev_size='all'"),
    ],
)
def test_impossible_sizes(k, dev_size, message):
    with pytest.raises(ValueError, match=message):
        few_shot_split(data(a=6, b=4), k, 13, "y", dev_size)


def test_unknown_label_column():
    with pytest.raises(ValueError, match="no column 'label'"):
        few_shot_split(data(a=6, b=4), 2, 13)


@pytest.mark.slow
def test_real_trec_keeps_its_rare_class():
    if not DATA.is_dir():
        pytest.skip("no shared data here")
    full = read_split(DATA / "trec")
    train, dev = few_shot_split(full, 500, 42)
    assert (len(train), len(dev)) == (500, 1_000)
    for part in (train, dev):
        for label, n in Counter(full["label"]).items():
            assert abs(Counter(part["label"])[label] - n * len(part) / len(full)) <= 1


def test_binary_metrics_by_hand():
    # tp 3, fp 1, fn 2, tn 4
    labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predictions = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    result = classification_metrics(predictions, labels)
    assert result == pytest.approx(
        {"accuracy": 0.7, "f1": 6 / 9, "mcc": (3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)}
    )
    assert all(type(value) is float for value in result.values())


def test_multiclass_metrics_by_hand():
    # Per-class F1: 0: 2/3, 1: 1/2, 2: 1. R_K from the confusion matrix.
    labels, predictions = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 2])
    result = classification_metrics(predictions, labels)
    assert result["accuracy"] == pytest.approx(0.8)
    assert result["f1"] == pytest.approx((4 / 5 + 2 / 3 + 1) / 3)
    covariance = 4 * 5 - (3 * 2 + 1 * 2 + 1 * 1)
    assert result["mcc"] == pytest.approx(covariance / math.sqrt((25 - 11) * (25 - 9)))


def test_two_of_three_classes_seen():
    seen = classification_metrics([0, 1, 1], [0, 1, 0], num_classes=3)
    assert seen["f1"] == pytest.approx(2 / 3)  # macro over classes 0 and 1, both 2/3
    assert classification_metrics([0, 0, 1], [0, 0, 0])["f1"] == 0.0  # binary: class 1
    assert classification_metrics([0, 0, 1], [0, 0, 0], 3)["f1"] == pytest.approx(0.4)


def test_degenerate_cases():
    assert classification_metrics([0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "mcc": 0.0}
    assert classification_metrics([1, 1], [1, 1]) == {"accuracy": 1.0, "f1": 1.0, "mcc": 0.0}
    assert classification_metrics([1, 1], [0, 1])["mcc"] == 0.0
    assert classification_metrics([1, 0], [0, 1])["mcc"] == pytest.approx(-1.0)


def test_large_counts_do_not_overflow():
    labels = np.tile([0, 1], 200_000)
    predictions = labels.copy()
    predictions[:1_000] = 1 - predictions[:1_000]
    assert classification_metrics(predictions, labels)["mcc"] == pytest.approx(0.995)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "got no predictions"),
        ([1], [1, 0], "1 predictions for 2 labels"),
        ([[0.1, 0.9]], [1], r"shape \(1, 2\).*argmax"),
        ([0.5], [1], "float64, expected integers"),
        (["a"], [1], "expected integers"),
        ([1], [-100], "class id -100 in labels"),
    ],
)
def test_bad_metric_inputs(predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(predictions, labels)
    with pytest.raises(ValueError, match="num_classes=2"):
        classification_metrics([2], [0], num_classes=2)

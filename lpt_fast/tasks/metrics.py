"""Accuracy, F1 and Matthews correlation in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def classification_metrics(
    predictions: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    num_classes: int | None = None,
) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation of class ids.

    Args:
        predictions: [N] class ids from 0, not logits.
        labels: [N] class ids from 0.
        num_classes: number of classes of the task. Give it where a task of more than two may show
            only the first two in a small sample. None: the largest id seen, plus one.

    Returns:
        accuracy: share of equal ids, 0..1.
        f1: two classes: F1 of the class with index 1. More: macro, the plain mean over the
            classes that occur in labels or predictions. 0 where nothing was there to find.
        mcc: Matthews correlation, -1..1; for more than two classes Gorodkin's R_K (2004). 0 where
            labels or predictions hold one class only and it is undefined.

    Raises:
        ValueError: empty, different lengths, not 1-dimensional, not integers, ids out of range.
    """
    import numpy as np

    predicted, true = _ids("predictions", predictions), _ids("labels", labels)
    if len(predicted) != len(true):
        raise ValueError(
            f"got {len(predicted)} predictions for {len(true)} labels, expected as many: pass both "
            "for the same examples"
        )
    largest = int(max(predicted.max(), true.max()))
    if num_classes is None:
        num_classes = max(2, largest + 1)
    elif largest >= num_classes:
        raise ValueError(
            f"got the class id {largest} with num_classes={num_classes}, expected ids below it: "
            "correct num_classes or the ids"
        )

    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # [true, predicted]
    np.add.at(confusion, (true, predicted), 1)
    correct = np.diagonal(confusion)
    n_true, n_predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    either = n_true + n_predicted
    f1_per_class = 2 * correct / np.maximum(either, 1)
    f1 = f1_per_class[1] if num_classes <= 2 else f1_per_class[either > 0].mean()

    # float64 before multiplying: products of counts overflow int64 for billions of examples only,
    # but the square of a product does for 50,000.
    total = float(len(true))
    n_true, n_predicted = n_true.astype(np.float64), n_predicted.astype(np.float64)
    covariance = float(correct.sum()) * total - float(n_true @ n_predicted)
    variance_true = total**2 - float(n_true @ n_true)
    variance_predicted = total**2 - float(n_predicted @ n_predicted)
    scale = (variance_true**0.5) * (variance_predicted**0.5)
    return {
        "accuracy": float(correct.sum() / total),
        "f1": float(f1),
        "mcc": covariance / scale if scale > 0 else 0.0,
    }


def _ids(name: str, values: Any) -> np.ndarray:
    import numpy as np

    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(
            f"got {name} of shape {array.shape}, expected [N] class ids: take the argmax of logits"
        )
    if array.size == 0:
        raise ValueError(f"got no {name}, expected one or more: evaluate on a split with examples")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"got {name} of type {array.dtype}, expected integers: turn labels into class ids first"
        )
    if array.min() < 0:
        raise ValueError(
            f"got the class id {int(array.min())} in {name}, expected 0 or more: drop unlabelled "
            "examples (-1, -100) first"
        )
    return array.astype(np.int64)

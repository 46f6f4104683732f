"""Few-shot samples as in the paper: K examples in all, in the proportions of the full data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from datasets import Dataset

FEW_SHOT_SEEDS = (13, 21, 42, 87, 100)
_DEFAULT_DEV_SIZE = 1_000


def few_shot_split(
    dataset: Dataset,
    k: int,
    seed: int,
    label_column: str = "label",
    dev_size: int | Literal["same"] | None = None,
) -> tuple[Dataset, Dataset]:
    """Draw disjoint training and development samples, both in the label proportions of the data.

    The same `dataset`, `k` and `seed` give the same training sample whatever `dev_size` is.

    Args:
        dataset: the full training data.
        k: number of training examples in total, not per class. With k >= the number of classes
            every class has at least one.
        seed: the paper's are `FEW_SHOT_SEEDS`.
        label_column: column of labels.
        dev_size: number of development examples, or "same" for k. None: 1,000 where that many
            are left, k otherwise.

    Returns:
        (train [k rows], dev [dev_size rows]), rows in the order of `dataset`.

    Raises:
        ValueError: k or dev_size below 1, or more than the data holds, or no such column.
    """
    import numpy as np

    from .readers import label_keys

    for name, value in (("k", k), ("dev_size", k if dev_size in (None, "same") else dev_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"got {name}={value!r}, expected a whole number of 1 or more"
                + (" or 'same'" if name == "dev_size" else "")
                + ": give the number of examples in total"
            )
    total = len(dataset)
    if k > total:
        raise ValueError(
            f"got k={k} for {total} examples, expected at most {total}: lower k or bring more data"
        )
    if dev_size is None:
        dev_size = _DEFAULT_DEV_SIZE if total - k >= _DEFAULT_DEV_SIZE else k
    elif dev_size == "same":
        dev_size = k
    if k + dev_size > total:
        raise ValueError(
            f"got k={k} and a development set of {dev_size} for {total} examples, expected at most "
            f"{total} together: lower k or dev_size"
        )

    by_class: dict[str, list[int]] = {}
    for row, key in enumerate(label_keys(dataset, label_column)):
        by_class.setdefault(key, []).append(row)
    # Sorted names, not first occurrence: the draw does not depend on the order of the classes.
    groups = [np.asarray(by_class[key]) for key in sorted(by_class)]
    generator = np.random.default_rng(seed)
    groups = [generator.permutation(group) for group in groups]
    sizes = [len(group) for group in groups]
    n_train = proportional_counts(sizes, k)
    # Proportions of the full data for the development set too: what is left has others.
    left = [size - n for size, n in zip(sizes, n_train, strict=True)]
    n_dev = proportional_counts(sizes, dev_size, limits=left)
    train = [group[:n] for group, n in zip(groups, n_train, strict=True)]
    dev = [group[n : n + d] for group, n, d in zip(groups, n_train, n_dev, strict=True)]
    return (
        dataset.select(np.sort(np.concatenate(train)).tolist()),
        dataset.select(np.sort(np.concatenate(dev)).tolist()),
    )


def proportional_counts(sizes: list[int], total: int, limits: list[int] | None = None) -> list[int]:
    """Share `total` among classes in proportion to `sizes`, each at most its limit.

    At least one for each class that has any, where `total` allows. Whole numbers are handed out
    one at a time to the class furthest below its exact share; ties go to the earlier class.

    Args:
        sizes: [C] proportions, as counts.
        total: the sum of the result; at most the sum of `limits`.
        limits: [C] most that a class can give. None: `sizes`.

    Returns:
        [C] counts.
    """
    limits = sizes if limits is None else limits
    assert total <= sum(limits)
    share = [total * size / sum(sizes) for size in sizes]
    counts = [min(int(s), limit) for s, limit in zip(share, limits, strict=True)]
    if total >= sum(limit > 0 for limit in limits):
        counts = [max(c, min(1, limit)) for c, limit in zip(counts, limits, strict=True)]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        able = [
            i
            for i, c in enumerate(counts)
            if (c < limits[i] if step > 0 else c > min(1, limits[i]))
        ]
        chosen = max(able, key=lambda i: (step * (share[i] - counts[i]), -i))
        counts[chosen] += step
    return counts

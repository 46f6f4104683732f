"""The text of ``lpt-fast demo``: honest sentences, a fixed split, no leaks."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from lpt_fast.cli import demo_data
from lpt_fast.cli.demo_data import (
    LABELS,
    build_demo_dataset,
    clean_docstring,
    normalise,
    swap_words,
)

# Written out here on purpose: a name that is lost from the module's own list must fail a test.
FORBIDDEN = (
    "torch pytorch numpy np ndarray scipy pandas pd dataframe sympy mpmath networkx nx "
    "transformers huggingface tensorflow python cpython http urllib smtplib imaplib socket "
    "shutil pathlib subprocess tempfile zipfile tarfile asyncio multiprocessing pyarrow"
)


@pytest.fixture(scope="module")
def pools():
    """The sources are read once for the whole file; every build below works on this."""
    return demo_data._collect_sentences()


@pytest.fixture
def read_once(pools, monkeypatch):
    monkeypatch.setattr(demo_data, "_collect_sentences", lambda: pools)


@pytest.fixture(scope="module")
def dataset(pools):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_data, "_collect_sentences", lambda: pools)
        return build_demo_dataset()


def rows_of(dataset):
    return [row for rows in dataset.values() for row in rows]


@pytest.mark.slow
def test_size_and_labels(dataset):
    assert list(dataset) == ["train", "validation", "test"]
    counts = Counter(row["label"] for row in rows_of(dataset))
    assert set(counts) == set(LABELS) and 0.9 < counts["intact"] / counts["swapped"] < 1.2
    assert len(dataset["train"]) <= 2400 and len(dataset["test"]) >= 1000
    assert len(dataset["validation"]) >= 300
    for rows in dataset.values():
        assert {row["label"] for row in rows} == set(counts)
        assert all(set(row) == {"text", "label"} for row in rows)


@pytest.mark.slow
def test_a_sentence_stands_once(dataset, pools):
    """In one split, and as itself or swapped, never as both: bags of words are unique."""
    bags = [tuple(sorted(normalise(row["text"]).split())) for row in rows_of(dataset)]
    twice = [bag for bag, n in Counter(bags).items() if n > 1]
    assert len(twice) <= 0.002 * len(bags)  # (two sentences of the same words)
    known = {text for rows in pools.values() for text in rows}
    for row in rows_of(dataset):
        assert (row["text"] in known) == (row["label"] == "intact"), row


@pytest.mark.parametrize(
    ("sentence", "swapped"),
    [
        ("Return the sum of it.", {"Return sum the of it.", "Return the of sum it."}),
        ("The the the (big) dog.", {None}),  # nothing that would be another sentence
        ("Only two.", {None}),
        ("It is, as said, so.", {None}),
    ],
)
def test_two_neighbours_are_swapped(sentence, swapped):
    assert swap_words(sentence) in swapped
    assert swap_words(sentence) == swap_words(sentence)


@pytest.mark.slow
def test_no_leaking_names_and_no_markup(dataset):
    for row in rows_of(dataset):
        words = re.findall(r"[a-z]+", row["text"].lower())
        assert not set(words) & set(FORBIDDEN.split()), row
        assert not re.search(r"[`_=<>{}\[\]\\|@]|\w\.\w|[a-z][A-Z]|\w\(", row["text"]), row
        assert 6 <= len(row["text"].split()) <= 40
        assert row["text"].isascii() and row["text"][0].isupper() and row["text"][-1] in ".!?"


@pytest.mark.slow
def test_same_rows_in_a_fresh_process(dataset):
    # A fresh process has another seed for hash(), and sees the imports the module needs.
    script = (
        "import hashlib, json, sys\n"
        "from lpt_fast.cli.demo_data import build_demo_dataset\n"
        "text = json.dumps(build_demo_dataset())\n"
        "assert not {'torch', 'numpy', 'pandas', 'sympy', 'networkx'} & set(sys.modules)\n"
        "print(text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == dataset


@pytest.mark.slow
def test_split_depends_on_neither_cap_nor_seed(dataset, read_once):
    split = {row["text"]: name for name, rows in dataset.items() for row in rows}
    for other in (build_demo_dataset(600), build_demo_dataset(seed=7)):
        shared = [(r["text"], name) for name, rows in other.items() for r in rows]
        known = [(text, name) for text, name in shared if text in split]
        assert len(known) > 200 and all(split[text] == name for text, name in known)
    small, other = build_demo_dataset(600), build_demo_dataset(600, seed=7)
    assert {r["text"] for r in rows_of(small)} <= set(split)
    assert {r["text"] for r in small["train"]} != {r["text"] for r in other["train"]}


def test_split_and_group_do_not_depend_on_file_order(tmp_path):
    first = "Compute the length of the path between two points."
    second = "The points have to lie on the same surface."
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(f'"""{first}  {second}"""\n')
    (tmp_path / "three.py").write_text(f'def f():\n    """{second}"""\n')
    files = sorted(tmp_path.glob("*.py"))
    pool = demo_data._read_pool(files)
    assert pool == demo_data._read_pool(files[::-1])
    assert set(pool) == {normalise(first), normalise(second)}


def test_known_openings_keep_their_split():
    # Computed once and written down: results are only comparable while these stay.
    assert demo_data._split_of("read all of the lines in a file") == "validation"
    assert demo_data._split_of("return the sum of the array elements") == "test"
    assert demo_data._split_of("the class holds a table") == "train"


def test_files_come_in_a_fixed_spread_out_order(tmp_path):
    for name in ("a/x.py", "a/y.py", "b/x.py", "a/tests/x.py", "c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    files = demo_data._source_files(tmp_path, ())
    names = [f.relative_to(tmp_path).as_posix() for f in files]
    assert sorted(names) == ["a/x.py", "a/y.py", "b/x.py", "c.py"]
    assert files == demo_data._source_files(tmp_path, ("c.py", "b", "a", "absent.py"))


def test_cleaning_keeps_prose_only():
    doc = """Return the sorted keys of a mapping, smallest first.

    The keys have to be comparable to each other, e.g. all of them numbers.
    Otherwise an error is raised (as usual).

    >>> sorted_keys({2: "This is a value of the doctest."})
    This line is the printed output of a doctest.

    For instance this one has a sample which follows::

        This is the code that belongs to the sample.

    .. note:: This directive holds a note that is not wanted.

    - This bullet is the first of a list of things.

    Parameters
    ----------
    mapping : dict
        This is the description of a parameter in a table.

    Returns
    -------
    This is the description of what is returned here.
    """
    assert clean_docstring(doc) == [
        "Return the sorted keys of a mapping, smallest first.",
        "The keys have to be comparable to each other, for example all of them numbers.",
        "Otherwise an error is raised (as usual).",
    ]


def test_cleaning_stops_at_google_sections():
    doc = "Read all of the lines in a file.\n\nArgs:\n    name: This is the name of the file.\n"
    assert clean_docstring(doc) == ["Read all of the lines in a file."]
    assert clean_docstring("") == [] and clean_docstring("\n   \n") == []


@pytest.mark.parametrize(
    "sentence",
    [
        "Return the `axis` of the array which is the longest.",
        "Return the value of max_value that is in the table.",
        "The class DataFrame is the one that holds a table.",
        "This is how the numpy function of the same name works.",
        "This is a PyTorch module that is used for the test.",
        "This is a non-Python object that has to be converted.",
        "See the page at https://example.org for all of the details.",
        "Call the method os.path of the module to get it.",
        "Call open() on the name of the file to read it.",
        "The function maps x to y in A for z of B.",
        "Too short a sentence.",
        "it starts with a small letter and is not a sentence.",
        "The heading of a table that has no end",
        "The sentence was cut (in the middle of a bracket.",
        "Licensed under the terms of the agreement in this file.",
        "Word " * 41 + "of the end.",
    ],
)
def test_refused_sentences(sentence):
    assert not demo_data.is_english_sentence(sentence)


@pytest.mark.slow
def test_missing_packages_give_a_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install torch numpy pandas sympy networkx"):
        build_demo_dataset()


@pytest.mark.slow
def test_one_missing_package_leaves_its_sentences_out(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name)
    )
    assert set(demo_data._collect_sentences()) == set(demo_data._SOURCES) - {"tables"}

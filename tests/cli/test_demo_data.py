"""The text of ``lpt-fast demo``: honest sentences, a fixed split, no leaks."""

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from lpt_fast.cli import demo_data
from lpt_fast.cli.demo_data import build_demo_dataset, clean_docstring, normalise
from lpt_fast.cli.demo_spelling import CORRECT, MISSPELT, misspell, slips_of, with_label

# Written out here on purpose: a name that is lost from the module's own list must fail a test.
FORBIDDEN = (
    "torch pytorch numpy np ndarray scipy pandas pd dataframe sympy mpmath networkx nx "
    "transformers huggingface tensorflow python cpython http urllib smtplib imaplib socket "
    "shutil pathlib subprocess tempfile zipfile tarfile asyncio multiprocessing pyarrow"
)


@pytest.fixture(scope="module")
def pools():
    """The sources are read once for the whole file; every build below works on this."""
    return demo_data.collect_sentences()


@pytest.fixture
def read_once(pools, monkeypatch):
    monkeypatch.setattr(demo_data, "collect_sentences", lambda: pools)


@pytest.fixture(scope="module")
def dataset(pools):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_data, "collect_sentences", lambda: pools)
        return build_demo_dataset()


def rows_of(dataset):
    return [row for rows in dataset.values() for row in rows]


@pytest.fixture(scope="module")
def sentences(pools):
    """Every sentence as it was written, with its docstring group."""
    return {text: group for rows in pools.values() for text, group in rows.items()}


@pytest.mark.slow
def test_size_and_labels(dataset):
    assert list(dataset) == ["train", "validation", "test"]
    total = len(rows_of(dataset))
    assert 1500 <= total <= 600 * len(demo_data._SOURCES)
    assert 0.5 * total < len(dataset["train"]) < 0.7 * total
    assert len(dataset["test"]) > 0.2 * total
    for rows in dataset.values():
        share = Counter(row["label"] for row in rows)
        assert set(share) == {CORRECT, MISSPELT}
        assert 0.4 < share[MISSPELT] / len(rows) < 0.6
        assert all(set(row) == {"text", "label"} for row in rows)


@pytest.mark.slow
def test_no_duplicates_and_no_shared_openings(sentences):
    keys = [normalise(text) for text in sentences]
    assert len(keys) == len(set(keys))
    # Sentences with the same first five words are near-duplicates, whatever package they are of.
    openings = [tuple(key.split()[:5]) for key in keys]
    assert len(openings) == len(set(openings))


@pytest.mark.slow
def test_a_sentence_is_there_once_with_a_slip_or_without(dataset, sentences):
    made = {with_label(text): demo_data._split_of(group) for text, group in sentences.items()}
    for split, rows in dataset.items():
        assert all(made[row["text"], row["label"]] == split for row in rows)
        assert not [r for r in rows if r["label"] == MISSPELT and r["text"] in sentences]
        assert not [r for r in rows if r["label"] == CORRECT and r["text"] not in sentences]
    assert len({row["text"] for row in rows_of(dataset)}) == len(rows_of(dataset))


@pytest.mark.slow
def test_no_names_and_no_markup(sentences):
    for text in sentences:
        assert not set(re.findall(r"[a-z]+", text.lower())) & set(FORBIDDEN.split()), text
        assert not re.search(r"[`_=<>{}\[\]\\|@]|\w\.\w|[a-z][A-Z]|\w\(", text), text
        assert 6 <= len(text.split()) <= 20
        assert text.isascii() and text[0].isupper() and text[-1] in ".!?"


def test_slips():
    assert " ".join(slips_of("graph")) == "gaph garph graaph grah grapph grpah grph grraph"
    # A letter that stands twice is lost only once, and two like letters do not change places.
    assert " ".join(slips_of("aabba")) == "aaabba aaba aabbba ababa abba"
    for word in ("graph", "letter", "occurrence"):
        slips = slips_of(word)
        assert word not in slips and len(slips) == len(set(slips))
        assert all(s[0] == word[0] and s[-1] == word[-1] for s in slips)


def test_one_word_of_a_sentence_gets_a_slip():
    for text in ("Return the length of the path.", "Whether a half-open interval isn't empty."):
        before, after = text.split(), misspell(text).split()
        (changed,) = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        word, slip = (w.strip(".") for w in changed)
        assert slip in slips_of(word) and len(word) >= 5 and word.islower()
    assert misspell("Whether it isn't half-done or so.") is None
    # A sentence without such a word is right in any case.
    assert all(with_label(f"It is {n}.") == (f"It is {n}.", CORRECT) for n in range(20))


def test_known_sentences_keep_their_label_and_slip():
    # Computed once and written down, as the split below.
    known = {
        "Read all of the lines in a file.": ("Read all of the lines in a file.", CORRECT),
        "Return the length of the path between two points.": (
            "Return the length of the path between two poitns.",
            MISSPELT,
        ),
    }
    assert {text: with_label(text) for text in known} == known


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
    split = {row["text"]: (row["label"], name) for name, rows in dataset.items() for row in rows}
    for other in (build_demo_dataset(max_per_topic=60), build_demo_dataset(seed=7)):
        shared = [(r["text"], (r["label"], name)) for name, rows in other.items() for r in rows]
        known = [(text, place) for text, place in shared if text in split]
        assert len(known) > 200 and all(split[text] == place for text, place in known)
    small, other = build_demo_dataset(max_per_topic=60), build_demo_dataset(60, seed=7)
    assert {r["text"] for r in rows_of(small)} <= set(split)
    assert {r["text"] for r in rows_of(small)} != {r["text"] for r in rows_of(other)}


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
    assert demo_data._split_of("read all of the lines in a file") == "train"
    assert demo_data._split_of("create and return a temporary directory") == "validation"
    assert demo_data._split_of("return the sum of the array elements") == "test"


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
        "Word " * 21 + "of the end.",
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
def test_one_missing_package_leaves_its_topic_out(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name)
    )
    assert set(demo_data.collect_sentences()) == set(demo_data._SOURCES) - {"tables"}

"""Real English text for ``lpt-fast demo``, without a download.

The text is the prose of docstrings in Python's standard library and in packages that come with
the dependencies of lpt-fast (torch brings sympy and networkx, datasets brings pandas). The sources
are only read and parsed with ``ast``; no package is imported. The task is in demo_spelling.py.

Sentences keep plain English words only: one that names a package or holds an identifier or markup
is left out, for such words look misspelt and are not. The split is fixed: it depends on a hash of
the docstring's opening, never on the seed, the cap or the order of files, and the sentences of a
docstring fall into the same split (those that several docstrings share follow one of them).
"""

# ruff: noqa: SIM905 - long word lists read better as text than with a quote around every word

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from .demo_spelling import digest, with_label

# Topic -> package (None: standard library) and the parts of it to read, () for the whole of it.
_SOURCES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "deep learning": (
        "torch",
        tuple(
            "nn optim utils autograd distributed distributions amp ao cuda fx jit sparse linalg "
            "special fft func nested export profiler _torch_docs.py _tensor_docs.py functional.py "
            "_tensor.py".split()
        ),
    ),
    "arrays": ("numpy", ()),
    "tables": ("pandas", ()),
    "symbolic mathematics": ("sympy", ()),
    "graphs": ("networkx", ()),
    "files and internet": (
        None,
        tuple(
            "os.py shutil.py pathlib.py pathlib subprocess.py tempfile.py zipfile.py zipfile "
            "tarfile.py gzip.py bz2.py lzma.py glob.py fnmatch.py filecmp.py fileinput.py stat.py "
            "posixpath.py ntpath.py genericpath.py platform.py signal.py pty.py getpass.py "
            "queue.py multiprocessing concurrent threading.py sched.py io.py _pyio.py sysconfig.py "
            "site.py venv zipapp.py logging linecache.py compileall.py http urllib email xmlrpc "
            "wsgiref socket.py socketserver.py ssl.py smtplib.py poplib.py imaplib.py ftplib.py "
            "mailbox.py mimetypes.py webbrowser.py ipaddress.py netrc.py html asyncio "
            "selectors.py".split()
        ),
    ),
}

# Candidate sentences read per topic: fixed, so that every max_per_topic chooses among the same
# sentences, and small enough that reading takes seconds.
_POOL = 1000
_MAX_FILE_BYTES = 600_000
_MAX_PER_DOCSTRING = 4
_MIN_TOPICS, _MIN_TOPIC_SIZE, _MIN_TOTAL, _DEFAULT_CAP = 4, 100, 1500, 600
_SKIP_PARTS = frozenset(
    "test tests testing _testing conftest.py benchmarks sandbox distutils f2py _vendor".split()
)

LEAKING_NAMES = frozenset(
    "torch pytorch torchvision torchaudio torchscript libtorch aten dynamo inductor caffe fsdp ddp "
    "autograd fx nn stdlib pypi pip "
    "numpy np ndarray ndarrays numarray scipy matlab fortran ufunc ufuncs dtype dtypes "
    "pandas pd dataframe dataframes groupby multiindex arrow pyarrow parquet "
    "sympy mpmath sympify lambdify expr exprs networkx nx graphviz matplotlib stdout "
    "transformers huggingface tensorflow jax flax keras python pythonic cpython cython jython "
    "http httplib urllib smtplib poplib imaplib ftplib nntplib telnetlib socketserver asyncio "
    "xmlrpc wsgi wsgiref mailbox mimetypes webbrowser ipaddress netrc cgi ssl email socket "
    "os shutil pathlib subprocess tempfile zipfile tarfile gzip lzma glob fnmatch filecmp "
    "fileinput posixpath ntpath genericpath posix multiprocessing threading stdin stderr".split()
)

# Abbreviations that show a sentence to be about code, not written in plain English.
_CODE_WORDS = frozenset("args kwargs int str bool obj func fn idx attr attrs docstring".split())
_STOP_WORDS = frozenset(
    "a an the of to in is are be by for with that this it its from on as and or not if when which "
    "can has have will at into no any all each than then been was does must may should".split()
)
_SECTION = re.compile(
    r"^(args?|arguments?|parameters?|returns?|yields?|raises?|examples?|notes?|references?|"
    r"see also|attributes?|warnings?|keyword arguments|keyword args|kwargs|shape|inputs?|"
    r"outputs?|usage|methods?|todo|explanation|authors?)\s*:*\s*$",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"^([=\-~^*#\"'+])\1{2,}\s*$")
_BLOCK_MARK = re.compile(r"^(>>>|\.\. |:\w|[-*+•|@$>#]|\d+[.)]\s|\(?[a-z\d][.)]\s|\w+\s+:|\w+ ?--)")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*|[A-Z]{2,}s|\d{1,4}")
_CAMEL = re.compile(r"[a-z][A-Z]|[A-Z]{2,}[a-z]{2,}")
_URL = re.compile(r"https?:|www\.|\S@\S", re.IGNORECASE)
_NOT_PROSE = re.compile(
    r"[`_=<>{}\[\]\\|$*/~^+%&#@:;]|[^\x00-\x7f]|\.\.|\w\(|\w\.\w|\s\.|--| - |\?\?|^See "
)
_LEGAL = re.compile(r"\b(copyright|licen[cs]ed?|all rights|todo|fixme|deprecated)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'(]?[A-Z])")


def build_demo_dataset(max_per_topic: int = _DEFAULT_CAP, seed: int = 0) -> dict[str, list[dict]]:
    """Return ``{"train", "validation", "test"}``, each a list of ``{"text", "label"}``.

    A topic has at most about 900 sentences. ``seed`` chooses which of them stay where there are
    more than ``max_per_topic``, and the order of the rows; the split of a sentence, its label and
    its slip depend on neither. A topic whose package is not installed is left out.

    Raises:
        RuntimeError: fewer than 4 topics or 1,500 sentences can be built on this machine.
    """
    topics = collect_sentences()
    total = sum(min(len(rows), _DEFAULT_CAP) for rows in topics.values())
    if len(topics) < _MIN_TOPICS or total < _MIN_TOTAL:
        missing = [pkg for pkg, _ in _SOURCES.values() if pkg and _package_folder(pkg) is None]
        raise RuntimeError(
            f"the demo needs {_MIN_TOPICS} topics and {_MIN_TOTAL:,} sentences but this machine "
            f"gives {len(topics)} and {total:,}: install the missing packages with "
            f"`pip install {' '.join(missing) or 'torch numpy datasets'}`"
        )
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for rows in topics.values():
        for text in sorted(rows, key=lambda t: digest(f"{seed}:{t}"))[:max_per_topic]:
            splits[_split_of(rows[text])].append(text)
    return {
        name: [
            dict(zip(("text", "label"), with_label(text), strict=True))
            for text in sorted(texts, key=lambda t: digest(f"order:{seed}:{t}"))
        ]
        for name, texts in splits.items()
    }


def clean_docstring(doc: str) -> list[str]:
    """The plain English sentences in the prose before the first section of a docstring."""
    sentences = []
    for paragraph in _paragraphs(doc):
        text = re.sub(r"\be\.g\.,?", "for example", paragraph)
        text = re.sub(r"\bi\.e\.,?", "that is", text)
        for sentence in _SENTENCE_END.split(text):
            if is_english_sentence(sentence):
                sentences.append(sentence)
    return sentences


def is_english_sentence(sentence: str, names: frozenset[str] = LEAKING_NAMES) -> bool:
    """True for 6 to 20 plain words, closed by a full stop, without markup, code or ``names``."""
    if not (sentence[:1].isupper() and sentence[-1:] in ".!?"):
        return False
    if _URL.search(sentence) or _NOT_PROSE.search(sentence) or _LEGAL.search(sentence):
        return False
    # An unpaired bracket or quote is what a wrongly cut sentence leaves behind.
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
        return False
    words = [token.strip("\"'(),.!?") for token in sentence.split()]
    if not 6 <= len(words) <= 20 or not all(_WORD.fullmatch(w) for w in words):
        return False
    if any(_CAMEL.search(w) for w in words) or names_in(sentence, names | _CODE_WORDS):
        return False
    # Lone letters are mostly variables ("the map f from A to B"), numbers mostly table cells.
    odd = sum(w.isdigit() or (len(w) == 1 and w not in "aAI") for w in words)
    return odd <= len(words) // 8 and sum(w.lower() in _STOP_WORDS for w in words) >= 2


def normalise(text: str) -> str:
    """Lower case words and digits only: two sentences that agree here count as duplicates."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def names_in(sentence: str, names: frozenset[str] = LEAKING_NAMES) -> set[str]:
    """The leaking names among the words of a sentence, hyphenated words taken apart."""
    return names.intersection(re.findall(r"[a-z]+", sentence.lower()))


def _paragraphs(doc: str) -> Iterator[str]:
    """Paragraphs of running text, each joined to one line, up to the first section heading."""
    block: list[str] = []
    for line in [*inspect.cleandoc(doc).splitlines(), ""]:
        section = _SECTION.match(line)
        if _UNDERLINE.match(line):
            block = []  # what stood above was a title
        elif line.strip() and not section:
            block.append(line)
        elif block:
            # An indented line belongs to a table, a list or a sample, "::" announces one.
            marked = any(b[0] == " " or _BLOCK_MARK.match(b) for b in block)
            if not marked and not block[-1].endswith(":"):
                yield " ".join(b.strip() for b in block)
            block = []
        if section:
            return


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file: module, classes, functions and ``add_newdoc`` style calls."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            if doc:
                yield doc
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            # numpy and torch document their compiled functions this way.
            name = getattr(node.value.func, "id", "")
            if name in {"add_newdoc", "add_docstr", "_add_docstr"}:
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value
        for field in ("body", "orelse", "handlers"):
            stack.extend(getattr(node, field, ()))


def _split_of(group: str) -> str:
    """The split of a docstring, about 60/10/30, from the normalised opening of its text.

    So much is for the test because 1,000 rows tell methods apart that 500 do not.
    """
    bucket = int(digest(group)[:8], 16) % 10
    return "train" if bucket < 6 else "validation" if bucket == 6 else "test"


def _package_folder(name: str) -> Path | None:
    """Where a package is installed; ``find_spec`` of a top-level name does not import it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec and spec.origin else None


def _source_files(root: Path, parts: Iterable[str]) -> list[Path]:
    """Source files in an order that is fixed and spread out over the sub-packages."""
    found: list[Path] = []
    for start in [root / part for part in parts] or [root]:
        found += [start] if start.is_file() else start.rglob("*.py")
    relative = [(f.relative_to(root), f) for f in found]
    kept = [(r.as_posix(), f) for r, f in relative if _SKIP_PARTS.isdisjoint(r.parts)]
    return [f for _, f in sorted(kept, key=lambda pair: digest(pair[0]))]


def collect_sentences() -> dict[str, dict[str, str]]:
    """For every topic, its sentences and the docstring group which decides their split."""
    pools = {}
    for topic, (package, parts) in _SOURCES.items():
        root = _package_folder(package) if package else Path(sysconfig.get_path("stdlib"))
        pools[topic] = _read_pool(_source_files(root, parts)) if root else {}

    # Near-duplicates ("Returns the number of rows / of columns ...") would leak between the
    # splits, so one sentence stays per opening; the hash picks it whatever the file order.
    openings: dict[str, tuple[str, str, str, str]] = {}
    for topic, pool in pools.items():
        for key, (text, group) in pool.items():
            opening = " ".join(key.split()[:5])
            candidate = (digest(key), topic, text, group)
            if candidate < openings.get(opening, ("g",)):
                openings[opening] = candidate
    topics: dict[str, dict[str, str]] = {topic: {} for topic in pools}
    for _, topic, text, group in openings.values():
        topics[topic][text] = group
    return {topic: rows for topic, rows in topics.items() if len(rows) >= _MIN_TOPIC_SIZE}


def _read_pool(files: Iterable[Path]) -> dict[str, tuple[str, str]]:
    """Normalised sentence -> (sentence, docstring group), until the pool is full."""
    pool: dict[str, tuple[str, str]] = {}
    for path in files:
        for doc in _docstrings(path):
            # The opening of a docstring names its group: copies of it elsewhere get the same one.
            group = normalise(doc)[:80]
            for text in clean_docstring(doc)[:_MAX_PER_DOCSTRING]:
                key = normalise(text)
                # A sentence found in several docstrings takes the smallest, whatever the order.
                pool[key] = min(pool.get(key, (text, group)), (text, group))
        if len(pool) >= _POOL:
            break
    return pool

"""Real English text for ``lpt-fast demo``, without a download.

The task: "have two neighbouring words of this sentence been swapped?". The text is the prose of
docstrings in Python's standard library and in packages that come with the dependencies of
lpt-fast (torch brings sympy and networkx, datasets brings pandas). The sources are only read and
parsed with ``ast``; no package is imported. Chosen by measuring: a head on the frozen encoder is no
better than chance, for what the encoder says of a whole sentence says little of the order of words;
layers that learn see it.

Sentences keep plain English words only. A sentence that holds an identifier, markup or a name of a
package, or stands in two of the sources, is left out. Half of the sentences, by a hash of their
text, have a swapped pair. The split is fixed: it depends on a hash of the docstring's opening,
never on the seed, the cap or the order of files, and the sentences of a docstring fall into the
same split (those that several docstrings share follow one of them).
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
from hashlib import sha256
from pathlib import Path

LABELS = ("intact", "swapped")

# Source -> package (None: standard library) and the parts of it to read, () for the whole of it.
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

# Candidate sentences read per source: fixed, so that every cap chooses among the same sentences,
# and small enough that reading takes seconds.
_POOL = 1000
_MAX_FILE_BYTES = 600_000
_MAX_PER_DOCSTRING = 4
_MIN_SOURCES, _MIN_SOURCE_SIZE, _MIN_TOTAL = 4, 100, 2500
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


def build_demo_dataset(max_train: int = 2400, seed: int = 0) -> dict[str, list[dict]]:
    """Return ``{"train", "validation", "test"}``, each a list of ``{"text", "label"}``.

    Some 5,000 sentences: half of them, at most `max_train`, to train on, a tenth for validation and
    the others to test on. ``seed`` chooses which training sentences stay, and the order of rows;
    what a sentence became and its split depend on neither. A source whose package is not installed
    is left out.

    Raises:
        RuntimeError: fewer than 4 sources or 2,500 sentences can be read on this machine.
    """
    sources = _collect_sentences()
    total = sum(map(len, sources.values()))
    if len(sources) < _MIN_SOURCES or total < _MIN_TOTAL:
        missing = [pkg for pkg, _ in _SOURCES.values() if pkg and _package_folder(pkg) is None]
        raise RuntimeError(
            f"the demo needs {_MIN_SOURCES} sources and {_MIN_TOTAL:,} sentences but this machine "
            f"gives {len(sources)} and {total:,}: install the missing packages with "
            f"`pip install {' '.join(missing) or 'torch numpy datasets'}`"
        )
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for rows in sources.values():
        for text, group in rows.items():
            swapped = swap_words(text) if _number(f"coin:{text}") % 2 else None
            row = {"text": swapped or text, "label": LABELS[swapped is not None]}
            splits[_split_of(group)].append(row)
    for rows in splits.values():
        rows.sort(key=lambda row: _digest(f"order:{seed}:{row['text']}"))
    del splits["train"][max_train:]
    return splits


def swap_words(sentence: str) -> str | None:
    """The sentence with two neighbouring words swapped, which two a hash decides; None where no two
    differ. The first word, which begins with a capital, and marks stay where they are.
    """
    words = sentence.split()
    plain = [word.isalpha() for word in words]
    places = [
        i
        for i in range(1, len(words) - 1)
        if plain[i] and plain[i + 1] and words[i].lower() != words[i + 1].lower()
    ]
    if not places:
        return None
    i = places[_number(f"place:{sentence}") % len(places)]
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


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
    """True for 6 to 40 plain words, closed by a full stop, without markup, code or ``names``."""
    if not (sentence[:1].isupper() and sentence[-1:] in ".!?"):
        return False
    if _URL.search(sentence) or _NOT_PROSE.search(sentence) or _LEGAL.search(sentence):
        return False
    # An unpaired bracket or quote is what a wrongly cut sentence leaves behind.
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
        return False
    words = [token.strip("\"'(),.!?") for token in sentence.split()]
    if not 6 <= len(words) <= 40 or not all(_WORD.fullmatch(w) for w in words):
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


def _digest(text: str) -> str:
    """A hash which, unlike ``hash()``, is the same in every process."""
    return sha256(text.encode()).hexdigest()


def _number(text: str) -> int:
    return int(_digest(text)[:8], 16)


def _split_of(group: str) -> str:
    """The split of a docstring, about 50/10/40, from the normalised opening of its text."""
    bucket = _number(group) % 10
    return "train" if bucket < 5 else "validation" if bucket == 5 else "test"


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
    return [f for _, f in sorted(kept, key=lambda pair: _digest(pair[0]))]


def _collect_sentences() -> dict[str, dict[str, str]]:
    """For every source, its sentences and the docstring group which decides their split."""
    pools = {}
    for label, (package, parts) in _SOURCES.items():
        root = _package_folder(package) if package else Path(sysconfig.get_path("stdlib"))
        pools[label] = _read_pool(_source_files(root, parts)) if root else {}

    seen: dict[str, int] = {}
    for pool in pools.values():
        for key in pool:
            seen[key] = seen.get(key, 0) + 1
    sources = {}
    for label, pool in pools.items():
        # Near-duplicates ("Returns the number of rows / of columns ...") would leak between the
        # splits, so one sentence stays per opening; the hash picks it whatever the file order.
        openings: dict[str, tuple[str, str, str]] = {}
        for key, (text, group) in pool.items():
            opening = " ".join(key.split()[:5])
            candidate = (_digest(key), text, group)
            if seen[key] == 1 and candidate < openings.get(opening, ("g",)):
                openings[opening] = candidate
        if len(openings) >= _MIN_SOURCE_SIZE:
            sources[label] = {text: group for _, text, group in openings.values()}
    return sources


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

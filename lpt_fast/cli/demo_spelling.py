"""The task of ``lpt-fast demo``: "is a word of this sentence misspelt?".

Half of the sentences stay as they are; in the others one letter of one word is lost, written twice
or has changed places with its neighbour. A hash of the sentence decides all of it, so a sentence
has the same label and the same slip on every machine, with every seed and in every order, and is
never there both with a slip and without.
"""

from __future__ import annotations

import re
from hashlib import sha256

CORRECT, MISSPELT = "correct", "misspelt"
# Slips in shorter words often make another word (form, from). In these 1 of 600 does.
_WORD = re.compile(r"(?<![\w'-])[a-z]{5,}(?![\w'-])")


def digest(text: str) -> str:
    """A hash which, unlike ``hash()``, is the same in every process."""
    return sha256(text.encode()).hexdigest()


def with_label(sentence: str) -> tuple[str, str]:
    """The sentence, with a slip or as it is, and its label."""
    if _number(f"coin:{sentence}") % 2:
        text = misspell(sentence)
        if text is not None:
            return text, MISSPELT
    return sentence, CORRECT


def misspell(sentence: str) -> str | None:
    """The sentence with one slip; None where no word is long enough for one.

    The first word has a capital and stays, and so do a word's first and last letters, as in slips
    of people.
    """
    words = list(_WORD.finditer(sentence))
    if not words:
        return None
    word = words[_number(f"word:{sentence}") % len(words)]
    slips = slips_of(word.group())
    slip = slips[_number(f"slip:{sentence}") % len(slips)]
    return sentence[: word.start()] + slip + sentence[word.end() :]


def slips_of(word: str) -> list[str]:
    """Every slip of a word: a letter lost, written twice, or in its neighbour's place."""
    inner = range(1, len(word) - 1)
    found = {word[:i] + word[i + 1 :] for i in inner}
    found |= {word[: i + 1] + word[i:] for i in inner}
    found |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner[:-1]}
    return sorted(found - {word})


def _number(text: str) -> int:
    return int(digest(text)[:12], 16)

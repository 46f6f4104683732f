"""From texts to token ids: cloze inputs that keep their template, label words, plain inputs.

The filled template is tokenised as one string, so that spaces are what the tokenizer makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .messages import shown
from .spec import MASK_FIELD, TaskSpec, template_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextFault(ValueError):
    """What is wrong with one text, for a caller who knows where it comes from."""


def label_word_ids(
    tokenizer: PreTrainedTokenizerBase, label_words: Mapping[str, str], template: str
) -> list[int]:
    """The token id of each label word, as it reads in its place in the template.

    The word is tokenised after the template's own text, with a space before it where `{mask}`
    follows a space; tokenizers that mark spaces (BPE, SentencePiece) so give the right one of
    " great" and "great". A mask at the very start counts as after a space: the authors' program
    and LM-BFF use the id with the space there too, and so agree with their numbers.

    Args:
        label_words: label -> word.
        template: a template with `{mask}`, or a decoder template without: there the word comes
            after the template's end, with a space unless it ends in a line break.

    Returns:
        [number of labels] ids, in the order of `label_words`.

    Raises:
        ValueError: a word is not exactly one token, is unknown, or shares its token with another
            label's word.
    """
    before, space = _text_before_word(template)
    prefix = _plain_ids(tokenizer, before)
    ids: list[int] = []
    for label, word in label_words.items():
        joined = _plain_ids(tokenizer, before + space + word)
        # Where the word merges with what is before it, the model, which sees the mask as a token
        # of its own, would never meet that merge: the word by itself is the answer.
        merged = joined[: len(prefix)] != prefix
        tail = _plain_ids(tokenizer, space + word) if merged else joined[len(prefix) :]
        tokens = tokenizer.convert_ids_to_tokens(tail)
        if len(tail) != 1:
            raise ValueError(
                f"got the label word {word!r} for label {label!r}, which is {len(tail)} tokens "
                f"{tokens}, expected exactly one: choose a shorter or more common word"
            )
        if tail[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"got the label word {word!r} for label {label!r}, which is the unknown token "
                f"{tokens}, expected a word of the vocabulary: choose another word"
            )
        if tail[0] in ids:
            other, same = list(label_words.items())[ids.index(tail[0])]
            raise ValueError(
                f"got the label words {same!r} for label {other!r} and {word!r} for "
                f"label {label!r}, which are the same token {tokens}, expected a token for each: "
                "choose another word for one of them"
            )
        ids.append(tail[0])
    return ids


def encode_cloze(
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    example: Mapping[str, Any],
    max_length: int,
    *,
    decoder: bool = False,
) -> dict[str, Any]:
    """Fill the task's template with one example and tokenise it.

    Only the texts are ever shortened, at their ends, the longest first; template, mask and special
    tokens always stay. No padding.

    Args:
        example: the text columns under their canonical or hub names; more columns do no harm.
        max_length: most tokens, special tokens included.
        decoder: use `decoder_template`; the label word is then predicted at the last token, so
            special tokens that the tokenizer puts at the end (EOS, SEP) are left out.

    Returns:
        input_ids [S], attention_mask [S], token_type_ids [S] where the tokenizer has them, and
        `mask_position` (int, 0-based), or with `decoder` instead `context_lengths` (int, S).

    Raises:
        ValueError: no mask token, no decoder template, a template that does not fit into
            `max_length`, a text that holds the mask token itself, a missing or non-string text.
    """
    texts = {column: text.strip() for column, text in spec.fields(example).items()}
    if decoder:
        template, mask = spec.decoder_template, ""
        if template is None:
            raise ValueError(
                f"got task {spec.name!r} without a decoder_template, expected one for a causal "
                "model: add a template that the label word continues"
            )
    else:
        template, mask = spec.template, tokenizer.mask_token
        if mask is None:
            raise ValueError(
                f"got a {type(tokenizer).__name__} without a mask token, expected one for the "
                "template's {mask}: use a masked model, or decoder=True with a causal one"
            )
        for column, text in texts.items():
            if mask in text:
                raise TextFault(
                    f"got the mask token {mask!r} inside the text of column {column!r}, expected "
                    "it only in the template: replace it in the data"
                )
    # The space before the mask belongs to the label word's token. RoBERTa's mask token swallows it
    # (lstrip); where a tokenizer's does not, it would be left over as a token of its own.
    parts = [
        (literal.rstrip(" \t") if name == MASK_FIELD else literal, name)
        for literal, name in template_parts(template)
    ]

    def encode(shortened: Mapping[str, str]) -> dict[str, list[int]]:
        values = {**shortened, MASK_FIELD: mask}
        filled = "".join(literal + (values[name] if name else "") for literal, name in parts)
        return _encode(tokenizer, filled, strip_end=decoder)

    encoded = encode(texts)
    if len(encoded["input_ids"]) > max_length:
        encoded = _encode_shortened(tokenizer, spec, texts, max_length, encode)

    if decoder:
        return {**encoded, "context_lengths": len(encoded["input_ids"])}
    positions = [i for i, t in enumerate(encoded["input_ids"]) if t == tokenizer.mask_token_id]
    if len(positions) != 1:
        raise TextFault(
            f"got {len(positions)} mask tokens in the tokens of task {spec.name!r}, expected one: "
            f"check that the tokenizer keeps {mask!r} whole and that no text holds it"
        )
    return {**encoded, "mask_position": positions[0]}


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    columns: TaskSpec | str | Sequence[str],
    batch: Mapping[str, Sequence[str]],
    max_length: int,
) -> dict[str, list[list[int]]]:
    """Tokenise a batch for plain sequence classification, one text or a pair an example.

    Args:
        columns: a task, or the names of one or two text columns.
        batch: column name -> [B] texts.
        max_length: most tokens, special tokens included; of a pair the longer text gives way first.

    Returns:
        input_ids and what else the tokenizer gives: [B] lists of token ids, not padded.

    Raises:
        ValueError: no such column, a value that is no string, columns of different lengths.
    """
    if isinstance(columns, TaskSpec):
        names = list(columns.resolve_columns(batch).values())
    else:
        names = [columns] if isinstance(columns, str) else list(columns)
    if len(names) not in (1, 2):
        raise ValueError(f"got {len(names)} text columns {names}, expected one or two: choose them")
    texts = []
    for name in names:
        if name not in batch:
            raise ValueError(
                f"got no column {name!r}, expected it among {list(batch)}: correct the name"
            )
        values = batch[name]
        # A bare string is a sequence of strings too: its letters would become the examples.
        bad = shown(values) if isinstance(values, str) else _first_non_string(values)
        if bad is not None:
            raise ValueError(
                f"got {bad} in column {name!r}, expected a list of strings: pass a batch whose "
                "texts are filled"
            )
        texts.append(list(values))
    if len({len(values) for values in texts}) != 1:
        raise ValueError(
            f"got columns of {[len(values) for values in texts]} texts, expected as many in each: "
            "pass the same examples"
        )
    return dict(tokenizer(*texts, truncation="longest_first", max_length=max_length, padding=False))


def _encode_shortened(
    tokenizer: PreTrainedTokenizerBase,
    spec: TaskSpec,
    texts: Mapping[str, str],
    max_length: int,
    encode: Callable[[Mapping[str, str]], dict[str, list[int]]],
) -> dict[str, list[int]]:
    template_length = len(encode(dict.fromkeys(texts, ""))["input_ids"])
    if template_length > max_length:
        raise ValueError(
            f"got max_length={max_length}, expected {template_length} or more for the template of "
            f"task {spec.name!r} alone: raise max_length or shorten the template"
        )
    cuts = {column: _TextCut(tokenizer, text) for column, text in texts.items()}
    budget = max_length - template_length
    while True:
        lengths = _longest_first([cut.length for cut in cuts.values()], budget)
        shortened = {c: cut.first(n) for (c, cut), n in zip(cuts.items(), lengths, strict=True)}
        encoded = encode(shortened)
        excess = len(encoded["input_ids"]) - max_length
        if excess <= 0:
            return encoded
        # A text counts a token or two more inside the template than by itself (its first word
        # gets a space, a cut word other pieces). At budget 0 the texts are empty and it fits.
        budget = max(0, budget - excess)


class _TextCut:
    """A text by itself: its number of tokens, and its beginning of a given number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text
        self._ends: list[int] | None = None
        if tokenizer.is_fast:
            encoded = tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            self._ends = [end for _, end in encoded["offset_mapping"]]
            self.length = len(self._ends)
        else:
            self.length = len(_plain_ids(tokenizer, text))

    def first(self, count: int) -> str:
        if count >= self.length:
            return self._text
        if count == 0:
            return ""
        if self._ends is not None:
            return self._text[: self._ends[count - 1]].rstrip()
        # No offsets: the number of tokens grows with the number of characters, near enough.
        low, high = 0, len(self._text)
        while low < high:
            middle = (low + high + 1) // 2
            if len(_plain_ids(self._tokenizer, self._text[:middle])) <= count:
                low = middle
            else:
                high = middle - 1
        return self._text[:low].rstrip()


def _longest_first(lengths: list[int], budget: int) -> list[int]:
    """Lengths that sum to at most `budget`, got by shortening the longest, then both alike."""
    kept = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(order):
        # What the shorter texts leave is shared by the longer ones that remain.
        kept[i] = min(lengths[i], budget // (len(order) - done))
        budget -= kept[i]
    return kept


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, strip_end: bool) -> dict[str, list[int]]:
    # verbose=False: "longer than the maximum length" is no news here, the text is cut afterwards.
    encoded = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    end = len(encoded["input_ids"])
    if strip_end:
        special = encoded["special_tokens_mask"]
        while end > 0 and special[end - 1]:
            end -= 1
    keys = [k for k in ("input_ids", "attention_mask", "token_type_ids") if k in encoded]
    result = {key: list(encoded[key][:end]) for key in keys}
    result.setdefault("attention_mask", [1] * end)
    return result


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _text_before_word(template: str) -> tuple[str, str]:
    """The literal text right before the label word, and the space (or nothing) between the two."""
    parts = template_parts(template)
    names = [name for _, name in parts]
    if MASK_FIELD in names:
        before = parts[names.index(MASK_FIELD)][0]
        at_start = names[0] == MASK_FIELD and before == ""
        space = " " if at_start or before.endswith((" ", "\t")) else ""
    else:
        before = parts[-1][0] if names[-1] is None else ""
        space = "" if before.endswith("\n") else " "
    before = before.rstrip(" \t")
    # With a field (or nothing) right before the word, any word stands for it.
    return before if before.strip() else "it" + before, space


def _first_non_string(values: Sequence[Any]) -> str | None:
    return next((shown(value) for value in values if not isinstance(value, str)), None)

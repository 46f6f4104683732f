"""Labels of causal language models that begin at the first token (plain text), and TRL."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

from tests.adapters import lpt
from tests.method.test_task_types import M, adapted, generator_weights
from tests.oracle import late_prompt_by_hand
from tests.tiny import batch, tiny

READS_NO_TEXT, READS_TEXT = ("static", "residual"), ("npg", "appg", "mppg", "attention")


def plain_text():
    """All tokens are labels, as of a language model that is trained on texts."""
    inputs = batch()
    return inputs, inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def next_token_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_static_trains_on_plain_text(family, upper):
    """The loss is that of logits computed by hand from the prompt's own rows."""
    base, model = adapted(family, "CAUSAL_LM", "CAUSAL_LM", generator="static", upper=upper)
    inputs, labels = plain_text()
    k = model.peft_config["default"].insertion_layer
    weights = {n: p.detach() for n, p in generator_weights(model).items()}
    with torch.no_grad():
        backbone = base.transformer if family == "gpt2" else base.model
        logits = base.lm_head(late_prompt_by_hand(backbone, k, "static", weights, M, inputs))
    out = model.train()(**inputs, labels=labels)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[kept], logits[kept], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.loss, next_token_loss(logits, labels), atol=1e-5, rtol=1e-5)
    out.loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name


@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("generator", READS_NO_TEXT)
def test_where_labels_begin_does_not_matter_to_a_prompt_of_its_own(generator, upper):
    _, model = adapted("qwen3", "CAUSAL_LM", "CAUSAL_LM", generator=generator, upper=upper)
    inputs, labels = plain_text()
    answers = labels.clone()
    answers[:, :2] = -100
    logits = [model(**inputs, labels=y).logits for y in (labels, answers)]
    assert torch.equal(*logits)
    # A context that is given has to be sound all the same.
    with pytest.raises(ValueError, match="`context_lengths` must be between 1"):
        model(**inputs, labels=labels, context_lengths=torch.full((5,), 10**3))


@pytest.mark.parametrize("upper", ["packed", "padded"])
@pytest.mark.parametrize("generator", READS_TEXT)
def test_generators_that_read_the_context_need_one(generator, upper):
    if generator == "attention" and upper == "packed":
        upper = "auto"
    _, model = adapted("gpt2", "CAUSAL_LM", "CAUSAL_LM", generator=generator, upper=upper)
    inputs, labels = plain_text()
    with pytest.raises(ValueError, match="begin at its first token") as caught:
        model(**inputs, labels=labels)
    said = str(caught.value)
    assert len(said) <= 300 and "TRL: completion_only_loss" in said and "'static'" in said
    labels[:, :1] = -100
    assert model(**inputs, labels=labels).loss.isfinite()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mistral", "qwen3"])
def test_static_caches_are_refused_by_their_name(family):
    """And not by the shape of the masks that are made for them."""
    _, model = adapted(family, "CAUSAL_LM", "CAUSAL_LM")
    for side in ("none", "left"):
        with pytest.raises(ValueError, match="static KV cache.*expected a dynamic one"):
            model.generate(**batch(side), max_new_tokens=2, cache_implementation="static")


WORDS = ["a", "film", "was", "lovely", "bad", "great", "dull", "I", "liked", "hated", "it", "so"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def sft(tokenizer, folder, generator, columns, **more):
    """TRL's trainer over a small decoder with a late prompt."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = lpt(task_type="CAUSAL_LM", generator=generator)
    more = {"max_length": 16, "max_steps": 2, "per_device_train_batch_size": 4, **more}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    arguments = trl.SFTConfig(output_dir=str(folder), bf16=False, **quiet, **more)
    rows = datasets.Dataset.from_dict(columns)
    more = {"processing_class": tokenizer, "peft_config": config}
    return trl.SFTTrainer(tiny("qwen2", "CAUSAL_LM"), arguments, train_dataset=rows, **more)


def sentences(count=12):
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(count)]


def test_trl_trains(tokenizer, tmp_path):
    """On plain text with a prompt of its own, on completions with one made from the context."""
    texts = sentences()
    answers = {"prompt": [f"{text} " for text in texts], "completion": ["lovely"] * len(texts)}
    for generator, columns in (("static", {"text": texts}), ("npg", answers)):
        trainer = sft(tokenizer, tmp_path, generator, columns)
        own = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in own]
        assert trainer.train().training_loss > 0
        assert all(not torch.equal(p, q) for p, q in zip(own, before, strict=True))


def test_what_trl_cannot_have_is_refused_with_the_way_out(tokenizer, tmp_path):
    text = {"text": sentences()}
    with pytest.raises(ValueError, match=r"train generator='static'.*lpt_fast/train/README\.md"):
        sft(tokenizer, tmp_path, "npg", text).train()
    with pytest.raises(ValueError, match=r"packed into one row.*TRL: packing=False"):
        sft(tokenizer, tmp_path, "static", text, packing=True).train()

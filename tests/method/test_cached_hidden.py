"""`model(cached_hidden=batch)` against the run on the text, whose layers 1..k it leaves out.

The hidden states of a batch come from the unsplit model, which read each text alone and unpadded.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packing import PackedBatch
from tests.adapters import lpt, stir
from tests.oracle import layer_list
from tests.packed.test_packing import with_room
from tests.tiny import CAUSAL, CONFIGS, FAMILIES, LAYERS, PAD, batch, tiny
from tests.train.test_trainer import assert_same, collate, new_model, rows, trained, trainer_for

M = 3
ENDS = 1  # T5's end token


def states_alone(base, ids, k, **more):
    """What goes into layer k + 1 of an unadapted model for one text, [n, D]."""
    backbone, seen = find_backbone(base)[1], {}

    def look(module, args, kwargs):
        seen["hidden"] = args[0] if args else kwargs["hidden_states"]

    handle = layer_list(backbone)[k].register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        backbone(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **more)
    handle.remove()
    return seen["hidden"][0]


def cached(base, inputs, k=2, room=0, ids=True, positions=None):
    """The batch of hidden states for right-padded inputs; its free rows hold NaN."""
    lengths = inputs["attention_mask"].sum(1)
    texts = [t[:n] for t, n in zip(inputs["input_ids"], lengths, strict=True)]
    more = [{} for _ in texts]
    if positions is not None:
        positions = [p[:n] for p, n in zip(positions, lengths, strict=True)]
        more = [{"position_ids": p[None]} for p in positions]
    hidden = [states_alone(base, t, k, **m) for t, m in zip(texts, more, strict=True)]
    packed = PackedBatch(
        torch.cat(hidden),
        torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        int(lengths.max()),
        input_ids=torch.cat(texts) if ids else None,
        position_ids=None if positions is None else torch.cat(positions),
    )
    return with_room(packed, room) if room else packed


def adapted(family, kind="base", k=2, task=None, base=None, **config):
    """The base model untouched, and an adapted copy of it that was moved as by training."""
    base = tiny(family, kind) if base is None else base
    torch.manual_seed(7)
    settings = {"insertion_layer": k, "num_virtual_tokens": M, "prompt_dropout": 0.0, **config}
    model = get_peft_model(copy.deepcopy(base), lpt(task_type=task, **settings)).eval()
    stir(model)
    return base, model


def text_batch(family="bert"):
    inputs = batch()
    if family == "t5":
        last = inputs["attention_mask"].sum(1) - 1
        inputs["input_ids"][torch.arange(5), last] = ENDS
    return inputs


def main_output(out):
    """Logits or states of a model's output, the first tensor that is not the loss."""
    names = ("logits", "start_logits", "last_hidden_state")
    return next(out[name] for name in names if out.get(name) is not None)


def run(model, at=None, **call):
    """Output at the tokens, loss, and the gradients of everything that trains."""
    model.zero_grad()
    out = model(**call)
    value = main_output(out)
    value = value if at is None else value[at]
    pull = torch.randn(value.shape, generator=torch.Generator().manual_seed(4))
    loss = out.get("loss")
    ((value * pull).sum() if loss is None else loss).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return value.detach(), None if loss is None else loss.detach(), grads


def assert_equal_runs(got, expected):
    torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
    if expected[1] is not None:
        torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)
    assert got[2].keys() == expected[2].keys() and got[2]
    for name, grad in expected[2].items():
        # (Gradients that are zero in exact arithmetic are nothing but rounding.)
        assert (got[2][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name
    assert sum(grad.norm() for grad in expected[2].values()) > 1e-3


@pytest.mark.parametrize(("k", "generator"), [(1, "appg"), (2, "npg"), (3, "mppg")])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, k, generator):
    base, model = adapted(family, k=k, generator=generator)
    inputs = batch()
    at = inputs["attention_mask"].bool()
    expected = run(model, at, **inputs)
    for room in (0, M):
        assert_equal_runs(run(model, at, cached_hidden=cached(base, inputs, k, room)), expected)
    # The batch must matter, or the comparison says nothing.
    other = cached(base, batch(seed=2), k)
    assert not torch.allclose(run(model, at, cached_hidden=other)[0], expected[0], atol=1e-3)


@pytest.mark.parametrize("generator", ["static", "npg", "appg", "mppg", "attention", "residual"])
@pytest.mark.parametrize("family", ["roberta", "gpt2"])
def test_every_generator_without_padding(family, generator):
    base, model = adapted(family, generator=generator, num_virtual_tokens=5)
    inputs = batch("none")
    call = {"cached_hidden": cached(base, inputs)}
    assert_equal_runs(run(model, **call), run(model, **inputs))
    assert_equal_runs(run(model, **call), run(model, input_ids=inputs["input_ids"]))


def labels_for(family, task, inputs):
    """Labels of each task type, and where its logits are to be compared (None: everywhere)."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 1, 0, 1, 1])}, None
    if task == "TOKEN_CLS":
        return {"labels": (ids % 2).masked_fill(~mask, -100)}, mask
    if task == "QUESTION_ANS":
        start, end = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 2, 3, 0, 2])
        return {"start_positions": start, "end_positions": end}, None
    if task == "SEQ_2_SEQ_LM":
        return {"labels": torch.arange(20).view(5, 4) + 3}, None
    labels = ids.masked_fill(~mask, -100)
    if task == "CAUSAL_LM":  # contexts of 4, 4, 4, 1, 3 tokens
        labels[:, :4] = -100
        return {"labels": labels}, mask
    return {"labels": labels.masked_fill(ids % 3 > 0, -100)}, mask  # MASKED_LM


TASKS = [
    *((family, "SEQ_CLS") for family in FAMILIES),
    *((family, "TOKEN_CLS") for family in ("bert", "deberta-v2", "modernbert", "gpt2", "t5")),
    *((family, "QUESTION_ANS") for family in ("bert", "modernbert", "gpt2", "llama", "t5")),
    *((family, "CAUSAL_LM") for family in CAUSAL),
    *((family, "MASKED_LM") for family in ("bert", "roberta", "modernbert")),
    ("t5", "SEQ_2_SEQ_LM"),
]


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_every_task_type(family, task):
    """Through PEFT's own wrapper of each, with labels: output, loss and all gradients."""
    base, model = adapted(family, task, task=task if task != "MASKED_LM" else None)
    inputs = text_batch(family)
    if task == "QUESTION_ANS":
        # Transformers' loss looks for answers among padding rows too, which the batch does not
        # have.
        inputs = batch("none")
    labels, at = labels_for(family, task, inputs)
    call = {"cached_hidden": cached(base, inputs, room=M), **labels}
    assert_equal_runs(run(model, at, **call), run(model, at, **inputs, **labels))


def test_question_answering_with_padding():
    """Without labels; the loss would read padding."""
    base, model = adapted("bert", "QUESTION_ANS", task="QUESTION_ANS")
    inputs = batch()
    at = inputs["attention_mask"].bool()
    got = run(model, at, cached_hidden=cached(base, inputs))
    assert_equal_runs(got, run(model, at, **inputs))


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", None])
def test_bare_backbone_under_peft(task):
    base, model = adapted("bert", task=task)
    inputs = batch()
    got, expected = model(cached_hidden=cached(base, inputs)), model(**inputs)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
    by_tuner = model.base_model(cached_hidden=cached(base, inputs), return_dict=False)
    torch.testing.assert_close(by_tuner[1], expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_through_transformers_own_adapter_methods():
    base = tiny("bert", "SEQ_CLS")
    model = copy.deepcopy(base)
    model.add_adapter(lpt(), "mine")
    inputs, call = batch(), {"cached_hidden": cached(base, batch())}
    got, expected = model.eval()(**call).logits, model(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, base(**inputs).logits, atol=1e-3)
    model.disable_adapters()
    with pytest.raises(ValueError, match="no late prompt is active"):
        model(**call)


def test_encoder_decoder_without_a_head():
    base, model = adapted("t5", base=tf.T5Model(tf.T5Config(**CONFIGS["t5"])).eval())
    inputs, more = batch(), {"decoder_input_ids": torch.arange(10).view(5, 2)}
    got = run(model, cached_hidden=cached(base, inputs), use_cache=True, **more)
    assert_equal_runs(got, run(model, **inputs, **more))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_context_lengths(family):
    base, model = adapted(family, "CAUSAL_LM", task="CAUSAL_LM", generator="appg")
    inputs, more = batch(), {"context_lengths": torch.tensor([5, 4, 1, 1, 2])}
    at = inputs["attention_mask"].bool()
    call = {"cached_hidden": cached(base, inputs)}
    got = run(model, at, **call, **more)
    assert_equal_runs(got, run(model, at, **inputs, **more))
    assert not torch.allclose(got[0], run(model, at, **call)[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"got \[9, 5, 1, 1, 1\] for \[9, 4, 7, 1, 3\] tokens"):
        model(**call, context_lengths=torch.tensor([9, 5, 1, 1, 1]))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_last_token_where_padding_is_the_end_token(family):
    """Heads look for the last id that is not padding: for the batch's ids, not for its mask."""
    base, model = adapted(family, base=tiny(family, "SEQ_CLS", pad_token_id=2), task="SEQ_CLS")
    inputs, labels = batch(), {"labels": torch.tensor([0, 1, 0, 1, 1])}
    inputs["input_ids"][0, -1] = inputs["input_ids"][2, 6] = 2
    inputs["input_ids"].masked_fill_(inputs["attention_mask"] == 0, 2)
    expected = run(model, **inputs, **labels)
    assert_equal_runs(run(model, cached_hidden=cached(base, inputs), **labels), expected)
    without = model(cached_hidden=cached(base, inputs, ids=False)).logits
    torch.testing.assert_close(without[[1, 3, 4]], expected[0][[1, 3, 4]], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without[[0, 2]], expected[0][[0, 2]], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "SEQ_CLS"), ("llama", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")]
)
def test_without_ids(family, task):
    base, model = adapted(family, task, task=task)
    inputs = text_batch(family)
    labels, _ = labels_for(family, task, inputs)
    got = run(model, cached_hidden=cached(base, inputs, ids=False), **labels)
    assert_equal_runs(got, run(model, **inputs, **labels))


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_positions_of_the_batch(family):
    base, model = adapted(family)
    inputs = batch()
    at = inputs["attention_mask"].bool()
    positions = (torch.arange(9) * 2).repeat(5, 1)
    call = {"cached_hidden": cached(base, inputs, room=M, positions=positions)}
    got = run(model, at, **call)
    assert_equal_runs(got, run(model, at, **inputs, position_ids=positions))
    assert not torch.allclose(got[0], run(model, at, **inputs)[0], atol=1e-3)


# -- the layers below, modes and dtypes ------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_below_the_insertion_runs(family, k):
    base, model = adapted(family, k=k)
    call = {"cached_hidden": cached(base, batch(), k)}
    backbone = find_backbone(model.get_base_model())[1]

    def fail(module, args):
        raise AssertionError(f"{type(module).__name__} ran")

    layers = layer_list(backbone)
    for module in (backbone.get_input_embeddings(), *layers[:k]):
        module.register_forward_pre_hook(fail)
    ran = []
    for layer in layers[k:]:
        layer.register_forward_pre_hook(lambda *a: ran.append(1))
    model.train()(**call)
    assert len(ran) == LAYERS - k
    with pytest.raises(AssertionError, match="ran"):
        model(**batch())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("setting", ["checkpointing", "upper_dropout"])
def test_modes(family, setting):
    """The same draws of dropout too, for nothing below ever draws."""
    base = tiny(family)
    call = {"cached_hidden": cached(base, batch())}
    if setting == "checkpointing":
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, model = adapted(family, base=base, upper_dropout=setting == "upper_dropout")
    model.train()
    at, results = batch()["attention_mask"].bool(), []
    for given in (batch(), call):
        torch.manual_seed(5)
        results.append(run(model, at, **given))
    assert_equal_runs(*reversed(results))


def test_two_steps_of_training():
    base = tiny("gpt2", "CAUSAL_LM")
    inputs = batch()
    labels, _ = labels_for("gpt2", "CAUSAL_LM", inputs)
    ends = []
    for given in (inputs, {"cached_hidden": cached(base, inputs)}):
        _, model = adapted("gpt2", base=base, task="CAUSAL_LM", prompt_dropout=0.1)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**given, **labels).loss.backward()
            optimizer.step()
        ends.append(trained(model))
    assert_same(*ends, atol=1e-5, rtol=1e-4)
    moved = adapted("gpt2", base=base, task="CAUSAL_LM")[1]
    assert not torch.allclose(*(next(iter(t.values())) for t in (ends[0], trained(moved))))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_dtypes(family):
    """A bf16 store is widened under an fp32 model, an fp32 one is rounded under a bf16 model."""
    base, model = adapted(family)
    packed = cached(base, batch())
    half = packed.to(torch.bfloat16)
    at = batch()["attention_mask"].bool()
    got = run(model, at, cached_hidden=half)
    assert got[0].dtype == torch.float32
    assert_equal_runs(got, run(model, at, cached_hidden=half.to(torch.float32)))
    exact = model(**batch()).last_hidden_state[at]
    assert 0 < (got[0] - exact).abs().max() < 0.1 * exact.abs().max()
    small = model.to(torch.bfloat16)
    outs = [small(cached_hidden=b).last_hidden_state for b in (packed, half)]
    assert outs[0].dtype == torch.bfloat16 and torch.equal(*outs)


def test_compiled():
    base, model = adapted("bert", "SEQ_CLS", task="SEQ_CLS")
    compiled = torch.compile(model, backend="eager")
    for seed in (1, 2):
        got = compiled(cached_hidden=cached(base, batch(seed=seed))).logits
        torch.testing.assert_close(got, model(**batch(seed=seed)).logits, atol=1e-5, rtol=1e-5)


# -- calls do not mix ------------------------------------------------------------------------------


def test_threads_do_not_mix_batches():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    inputs = [batch(seed=1), batch(seed=2)]
    # Without ids: what took the wrong way would not find the text there.
    calls = [{"cached_hidden": cached(base, i, ids=False)} for i in inputs]
    with torch.no_grad():
        expected = [model(**i).logits for i in inputs]
    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait()

    model.get_base_model().register_forward_pre_hook(meet)
    got = [None, None]

    def work(i):
        with torch.no_grad():
            got[i] = model(**calls[i]).logits

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    at = inputs[0]["attention_mask"].bool()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[at], b[at], atol=1e-5, rtol=1e-5)


def test_nothing_is_left_for_the_next_call():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    inputs, call = batch("none"), {"cached_hidden": cached(base, batch(seed=2))}
    root = model.get_base_model()
    expected = root.transformer(**inputs).last_hidden_state
    late = root.transformer.late_prompt

    def check():
        assert not late.context._calls
        torch.testing.assert_close(root.transformer(**inputs).last_hidden_state, expected)

    model(**call)
    check()
    with pytest.raises(ValueError):  # in the backbone
        model(**call, context_lengths=torch.full((5,), 99))
    check()
    with pytest.raises(ValueError):  # in the checks
        model(**call, **inputs)
    check()

    def fail(*_):
        raise RuntimeError("before the backbone")

    handle = root.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="before the backbone"):
        model(**call)
    handle.remove()
    check()
    twin = copy.deepcopy(model)
    stir(twin)
    del model
    assert not torch.allclose(twin(**call).logits[:, 0], root(**call).logits[:, 0], atol=1e-3)


# -- refusals --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    base, model = adapted("gpt2", "CAUSAL_LM", task="CAUSAL_LM")
    return model, cached(base, batch())


def changed(packed, **more):
    fields = ("hidden", "cu_seqlens", "max_seqlen")
    return PackedBatch(**{**{n: getattr(packed, n) for n in fields}, **more})


REFUSED = {
    "`input_ids` together with `cached_hidden`, expected one": {"input_ids": torch.ones(5, 9)},
    "`inputs_embeds` together": {"inputs_embeds": torch.ones(5, 9, 32)},
    "`attention_mask` together": {"attention_mask": torch.ones(5, 9)},
    "`position_ids` together": {"position_ids": torch.ones(5, 9)},
    "`use_cache` together with `cached_hidden`, expected no KV cache": {"use_cache": True},
    "`past_key_values` together": {"past_key_values": tf.DynamicCache()},
    "output_hidden_states=True together .*expected False.*or give the text": {
        "output_hidden_states": True
    },
    "output_attentions=True together": {"output_attentions": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_come_with_a_batch(lm, message):
    model, packed = lm
    with pytest.raises(ValueError, match=message):
        model(cached_hidden=packed, **REFUSED[message])
    nothing = dict.fromkeys(REFUSED[message])
    expected = model(cached_hidden=packed).logits
    assert torch.equal(model(cached_hidden=packed, **nothing).logits, expected)
    if message.startswith("`use_cache"):
        assert model(cached_hidden=packed, use_cache=False).past_key_values is None


def test_positional_arguments(lm):
    model, packed = lm
    with pytest.raises(ValueError, match="`input_ids` together with `cached_hidden`"):
        model(batch()["input_ids"], cached_hidden=packed)
    with pytest.raises(ValueError, match="`input_ids` together with `cached_hidden`"):
        model.base_model(batch()["input_ids"], cached_hidden=packed)
    got = model.base_model(None, None, cached_hidden=packed).logits
    assert torch.equal(got, model(cached_hidden=packed).logits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b: torch.ones(5, 9, 32), r"is a Tensor, expected a PackedBatch; lpt_fast.packing"),
        (lambda b: changed(b, layer=3), "output of layer 3, expected that of layer 2"),
        (
            lambda b: changed(b, hidden=b.hidden[:, :16]),
            "rows of 16 torch.float32, expected the model's hidden size 32",
        ),
        (lambda b: changed(b, hidden=b.hidden.char()), "rows of 32 torch.int8, expected"),
        (
            lambda b: PackedBatch(torch.ones(0, 32), torch.zeros(1, dtype=torch.int32), 0),
            "holds no text, expected at least one",
        ),
    ],
)
def test_batches_that_do_not_fit(lm, make, message):
    model, packed = lm
    with pytest.raises(ValueError, match=message):
        model(cached_hidden=make(packed))
    model(cached_hidden=changed(packed, layer=2))


def test_hidden_states_and_attentions_of_the_config(lm):
    model, packed = lm
    config = model.get_base_model().config
    config.output_hidden_states = True
    try:
        with pytest.raises(ValueError, match="output_hidden_states=True together"):
            model(cached_hidden=packed)
        model(cached_hidden=packed, output_hidden_states=False)
    finally:
        config.output_hidden_states = False


def test_the_base_model_needs_the_text(lm):
    model, packed = lm
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="no late prompt is active, expected the text"),
    ):
        model(cached_hidden=packed)
    with pytest.raises(ValueError, match=r"generate\(\) got `cached_hidden`, expected the text"):
        model.generate(cached_hidden=packed, max_new_tokens=2)
    with pytest.raises(ValueError, match="GPT2Model got .*the whole model, GPT2LMHeadModel"):
        model.get_base_model().transformer(cached_hidden=packed)
    assert model(cached_hidden=None, **batch()).logits.shape == (5, 9, 99)


def test_heads_that_need_more_than_states():
    for head in (tf.T5ForSequenceClassification, tf.T5ForQuestionAnswering):
        base, model = adapted("t5", base=head(tf.T5Config(**CONFIGS["t5"])).eval())
        with pytest.raises(ValueError, match=f"{head.__name__} got .* without input_ids"):
            model(cached_hidden=cached(base, batch(), ids=False))
    base, model = adapted("bert", base=tf.BertForMultipleChoice(tiny("bert").config).eval())
    with pytest.raises(ValueError, match="the number of choices"):
        model(cached_hidden=cached(base, batch()))


def test_a_batch_is_checked_by_its_guard(lm):
    model, packed = lm
    seen = []
    late = model.get_base_model().transformer.late_prompt
    model(cached_hidden=packed)
    guarded = changed(packed, guard=lambda *call: seen.append(call))
    model(cached_hidden=guarded)
    assert seen == [(late, guarded)]


# -- the stock Trainer -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trainer(family, tmp_path):
    """Training, evaluation and prediction on batches of states equal those on texts."""
    base = tiny(family, "SEQ_CLS")

    def collate_cached(examples):
        inputs = collate(examples)
        return {"cached_hidden": cached(base, inputs), "labels": inputs["labels"]}

    ends, metrics, predictions = [], [], []
    for collator in (collate, collate_cached):
        model = new_model(family)
        before = trained(model)
        trainer = trainer_for(model, tmp_path, remove_unused_columns=False, max_steps=6)
        trainer.data_collator = collator
        trainer.train()
        ends.append(trained(model))
        metrics.append(trainer.evaluate())
        predictions.append(torch.as_tensor(trainer.predict(rows(10, 1)).predictions))
    assert_same(*ends, atol=1e-5, rtol=1e-4)
    assert all(not torch.equal(before[n], p) for n, p in ends[1].items() if "bias" not in n)
    assert metrics[0]["eval_accuracy"] == metrics[1]["eval_accuracy"]
    assert abs(metrics[0]["eval_loss"] - metrics[1]["eval_loss"]) < 1e-5
    torch.testing.assert_close(*predictions, atol=1e-4, rtol=1e-4)


def test_padding_rows_hold_zeros():
    """What no mask keeps a head from reading is at least the same in every batch."""
    base, model = adapted("bert")
    packed = cached(base, batch(), room=M)
    late = model.get_base_model().late_prompt
    late.upper = "padded"
    seen = []
    late.lpt_generator["default"].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(cached_hidden=packed)
    padding = batch()["attention_mask"] == 0
    assert not seen[0][padding].any() and seen[0].isfinite().all()
    assert batch()["input_ids"][padding].eq(PAD).all()

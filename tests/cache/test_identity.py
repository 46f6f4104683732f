"""What the identity of a cache depends on, and that nothing else is served from it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model

from lpt_fast.backbone.families import find_backbone
from lpt_fast.backbone.fingerprint import fingerprint, tensors_of
from lpt_fast.cache import ActivationCache, CacheError, MissingRowsError
from lpt_fast.cache.identity import VERSION, cut, identity_of
from lpt_fast.cache.shard import STORES
from tests.adapters import lpt, stir
from tests.cache.cached_texts import alone, assert_rows, counted, filled, ragged
from tests.tiny import AUTO, CAUSAL, FAMILIES, PAD, tiny

K = 2
# A text of every place and word that a change may show in.
TEXT = {"input_ids": [*range(3, 35)], "token_type_ids": [0, 1] * 16}


def digest(model, layer=K, store="bf16", **more) -> str:
    return identity_of(cut(model, layer), store, **more).digest


def text_of(model) -> dict:
    takes = find_backbone(model)[1].__class__.__name__ in (
        "BertModel",
        "RobertaModel",
        "XLMRobertaModel",
        "ElectraModel",
    )
    return TEXT if takes else {"input_ids": TEXT["input_ids"]}


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_below_the_cut(family):
    """Found by what they do: a weight whose change moves the hidden states is in the identity, by
    any one of its elements; those above the cut are not.
    """
    model = tiny(family, "SEQ_CLS")
    backbone = find_backbone(model)[1]
    before, states = digest(model), alone(model, text_of(model), K)
    own = torch.Generator().manual_seed(0)
    above = {p.data_ptr() for p in model.parameters()}
    moving = silent = 0
    for name, p in model.named_parameters():
        kept = p.detach().clone()
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=own) * 0.1)
            moves = not torch.equal(alone(model, text_of(model), K), states)
            p.copy_(kept)
            assert digest(model) == before
            place = int(torch.randint(p.numel(), (1,), generator=own))
            p.view(-1)[place] += 1e-3
            changed = digest(model) != before
            p.copy_(kept)
        if moves:
            assert changed, name
            moving += 1
            above.discard(p.data_ptr())
        elif changed:  # e.g. the bias of the keys, which softmax does not see
            assert any(p is q for _, q in tensors_of(cut(model, K).lower)), name
            silent += 1
    assert moving > 10 and silent < moving
    layers = cut(model, K).family.layers
    for name, _ in backbone.named_parameters():
        inside = name.startswith(layers)
        assert not inside or (int(name.removeprefix(layers + ".").split(".")[0]) < K) == any(
            name == other for other, _ in tensors_of(cut(model, K).lower)
        )
    for name, buffer in cut(model, K).lower.named_buffers():  # of positions, of frequencies
        with torch.no_grad():
            kept = buffer.clone()
            buffer.add_(1)
            assert digest(model) != before, name
            buffer.copy_(kept)
    assert digest(model) == before


@pytest.mark.slow
def test_what_else_counts():
    model = tiny("bert")
    digests = {digest(model, layer, store) for layer in (1, 2, 3) for store in STORES}
    assert len(digests) == 3 * 5
    digests |= {digest(model, compute_dtype=dtype) for dtype in ("bfloat16", "float16")}
    digests |= {digest(tiny("bert", seed=1)), digest(tiny("roberta"))}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        digests.add(digest(tiny("bert").to(dtype)))
    digests.add(digest(tiny("bert").bfloat16().float()))  # rounded weights
    assert len(digests) == 15 + 2 + 2 + 3 + 1
    assert digest(tiny("bert")) == digest(model, compute_dtype="float32")
    identity = identity_of(cut(model, K))
    assert identity.content["version"] == VERSION and identity.folder == identity.digest[:32]
    assert (identity.layer, identity.width, identity.store) == (K, 32, "bf16")


COUNTS = {
    "bert": {"layer_norm_eps": 1e-3, "hidden_act": "relu", "num_attention_heads": 2},
    "roberta": {"pad_token_id": 1, "type_vocab_size": 3},
    "gpt2": {"n_head": 2, "activation_function": "relu", "scale_attn_weights": False},
    "mistral": {"sliding_window": 5, "rms_norm_eps": 1e-3},
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "deberta-v2": {"position_buckets": 4},
    "t5": {"relative_attention_max_distance": 64},
}
DOES_NOT = {
    "bert": {
        "hidden_dropout_prob": 0.4,
        "attention_probs_dropout_prob": 0.3,
        "classifier_dropout": 0.2,
        "num_labels": 7,
        "problem_type": "regression",
        "initializer_range": 0.5,
        "use_cache": False,
        "pad_token_id": 1,
        "name_or_path": "elsewhere",
    },
    "gpt2": {"resid_pdrop": 0.4, "summary_type": "mean", "pad_token_id": 1, "eos_token_id": 7},
    "t5": {"dropout_rate": 0.5, "classifier_dropout": 0.3, "decoder_start_token_id": 4},
}


def changed_config(family, name, value):
    model = tiny(family)
    before = digest(model)
    setattr(find_backbone(model)[1].config, name, value)
    return before, digest(model)


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in COUNTS.items() for n in names])
def test_fields_of_the_configuration_that_count(family, name):
    before, after = changed_config(family, name, COUNTS[family][name])
    assert before != after


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, names in DOES_NOT.items() for n in names]
)
def test_fields_that_do_not_count(family, name):
    before, after = changed_config(family, name, DOES_NOT[family][name])
    assert before == after


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_cache_for_every_task(family, tmp_path):
    """Precompute with AutoModel, train with a head and an adapter, in whatever mode: one cache."""
    data = [{"input_ids": [*example["input_ids"], 1]} for example in ragged()]  # 1: T5's end
    kinds = ["SEQ_CLS"]
    if family in (*CAUSAL, "t5"):
        kinds.append("CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM")
    source = tiny(family, kinds[-1] if family == "t5" else "SEQ_CLS")
    source.save_pretrained(tmp_path / "model")
    auto = tf.T5EncoderModel if family == "t5" else tf.AutoModel
    attention = {"attn_implementation": source.config._attn_implementation}
    base = auto.from_pretrained(tmp_path / "model", **attention)
    cache, rows = filled(tmp_path / "cache", base, data)
    expected = cache.read(rows).hidden
    for kind in kinds:
        names = {"id2label": {0: "a", 1: "b"}} if kind == "SEQ_CLS" else {}
        model = AUTO[kind].from_pretrained(tmp_path / "model", **attention, **names)
        before = digest(model)
        adapted = get_peft_model(model, lpt(task_type=kind, insertion_layer=K)).train()
        stir(adapted)
        assert digest(adapted) == digest(base) == before
        opened = ActivationCache.open(tmp_path / "cache", adapted)
        with counted(model) as seen:
            rows = opened.ensure(adapted, data)
        assert not seen and torch.equal(opened.read(rows).hidden, expected)
        if kind == "SEQ_CLS":
            labels = torch.zeros(12, dtype=torch.long)
            out = adapted(cached_hidden=opened.read(rows), labels=labels)
            assert out.logits.shape == (12, 2)
            out.loss.backward()


def test_a_fingerprint_is_cheap_and_sees_changes():
    model = tiny("bert")
    lower = cut(model, K).lower
    before = fingerprint(lower)
    assert fingerprint(cut(model, K).lower) == before
    assert fingerprint(cut(copy.deepcopy(model), K).lower) != before
    with torch.no_grad():
        model.encoder.layer[3].output.dense.weight.add_(1)
        assert fingerprint(lower) == before
        model.encoder.layer[1].output.dense.weight[0, 0] += 0.0
    assert fingerprint(lower) != before
    with torch.inference_mode():
        fingerprint(cut(tiny("bert"), K).lower)


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = tf.BertModel(tiny("bert").config)
    with pytest.raises(CacheError, match=r"The weight .* has no values .*meta device"):
        digest(model)


# -- what is never served --------------------------------------------------------------------------


def one_element(model):
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.weight[3, 5] += 1e-3
    return model


def other_eps(model):
    model.config.layer_norm_eps = 1e-3
    return model


OTHERS = {
    "one element of one weight": one_element,
    "another configuration": other_eps,
    "another model of the same shape and name": lambda model: tiny("bert", seed=1),
    "another dtype": lambda model: model.bfloat16(),
    "another family of the same shape": lambda model: tiny("electra", embedding_size=32),
}


@pytest.mark.parametrize("way", OTHERS)
def test_other_models_get_rows_of_their_own(way, tmp_path):
    model = tiny("bert")
    cache, rows = filled(tmp_path, model, ragged())
    expected = cache.read(rows).hidden
    other = OTHERS[way](tiny("bert"))
    other.config._name_or_path = model.config._name_or_path = "the-same/name"
    message = r"The cache is that of BertModel .* expected of this model \(\w+ .*differ\)"
    for act in (
        lambda: cache.ensure(other, ragged()),
        lambda: cache.build(other, ragged(4, seed=3)),
        lambda: ActivationCache.open(tmp_path, insertion_layer=K).ensure(other, ragged()),
    ):
        with pytest.raises(CacheError, match=message):
            act()
    with pytest.raises(CacheError, match=r"The cache /.* is that of BertModel .*open the folder"):
        ActivationCache.open(tmp_path / cache.identity.folder, other, insertion_layer=K)
    mine = ActivationCache.open(tmp_path, other, insertion_layer=K, store="fp32")
    assert len(mine) == 0
    for act in (lambda: mine.read([0]), lambda: mine.rows(ragged()), lambda: mine.stats()):
        with pytest.raises(CacheError, match="holds no cache yet, expected one to read from"):
            act()
    with counted(other) as seen:
        rows = mine.ensure(other, ragged())
    assert sum(seen) == 12
    close = {"atol": 1e-5, "rtol": 1e-5} if way != "another dtype" else {"atol": 0.1, "rtol": 0.1}
    assert_rows(mine, rows, [alone(other, example, K).float() for example in ragged()], **close)
    assert torch.equal(cache.read(cache.rows(ragged())).hidden, expected)  # still there
    if way != "another configuration":  # (which a built module no longer reads)
        assert not torch.equal(mine.read(rows).hidden, expected)


def test_a_cut_says_which_layer(tmp_path):
    model = tiny("bert")
    cache, _ = filled(tmp_path, model, ragged(), 1)
    with pytest.raises(CacheError, match=r"is that of BertModel .* at layer 1, .*at layer 2"):
        cache.ensure(model, ragged(), insertion_layer=2)
    with pytest.raises(MissingRowsError):
        cache.rows(ragged(3, seed=8))


# -- guards: what must not be cached ---------------------------------------------------------------


def test_weights_that_train(tmp_path):
    """With an adapter, or in training mode, nothing below the cut may require a gradient."""
    adapted = get_peft_model(tiny("bert", "SEQ_CLS"), lpt(task_type="SEQ_CLS", insertion_layer=K))
    backbone = find_backbone(adapted)[1]
    name = "encoder.layer.1.output.dense.bias"
    weight = backbone.get_parameter(name)
    for mode in (True, False):
        weight.requires_grad_(True)
        with pytest.raises(CacheError, match=rf"{name} at or below layer 2 trains .*freeze it"):
            ActivationCache.open(tmp_path, adapted.train(mode))
        weight.requires_grad_(False)
        filled(tmp_path, adapted, ragged())
        backbone.get_parameter("encoder.layer.2.output.dense.bias").requires_grad_(True)
        filled(tmp_path, adapted, ragged())
    base = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    filled(tmp_path, base, ragged())  # as it was loaded: all require gradients, nobody trains
    for layer in base.encoder.layer[2:]:
        layer.train()
    filled(tmp_path, base, ragged())
    with pytest.raises(CacheError, match="trains .*expected it frozen"):
        filled(tmp_path, base.train(), ragged())
    filled(tmp_path, base.requires_grad_(False), ragged())


@pytest.mark.parametrize("family", ["bert", "modernbert", "gpt2", "opt", "llama", "t5"])
def test_active_dropout(family, tmp_path):
    names = {
        "bert": "hidden_dropout_prob",
        "modernbert": "embedding_dropout",
        "gpt2": "attn_pdrop",
        "opt": "dropout",
        "llama": "attention_dropout",
        "t5": "dropout_rate",
    }
    zero = {"attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    if family == "gpt2":
        zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = tiny(family, **{**zero, names[family]: 0.1}).requires_grad_(False)
    cache, _ = filled(tmp_path, model, ragged())
    with pytest.raises(CacheError, match=r"at or below layer 2 has active dropout, .*\.eval\(\)"):
        filled(tmp_path, model.train(), ragged())
    assert cache.ensure(model.eval(), ragged()) is not None
    harmless = tiny(family, **{**zero, names[family]: 0.0}).requires_grad_(False).train()
    other, rows = filled(tmp_path, harmless, ragged())
    if family != "modernbert":  # that field's name is all that differs
        assert other.identity == cache.identity
    assert_rows(other, rows, [alone(model, example, K) for example in ragged()])


def test_dropout_above_the_cut_is_nobodys_business(tmp_path):
    model = tiny("bert").requires_grad_(False)
    model.encoder.layer[2].train()
    model.encoder.layer[3].train()
    filled(tmp_path, model, ragged())
    model.embeddings.dropout.train()
    with pytest.raises(CacheError, match="embeddings.dropout at or below layer 2 has active"):
        filled(tmp_path, model, ragged())


LORA = {"r": 2, "target_modules": ["query"]}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("layers", "refused"), [([0], True), ([1, 3], True), ([2, 3], False)])
def test_adapters_below_the_cut(layers, refused, frozen, tmp_path):
    model = get_peft_model(tiny("bert"), LoraConfig(layers_to_transform=layers, **LORA)).eval()
    if frozen:
        model.requires_grad_(False)
    if refused:
        message = r"attention.self.query at or below layer 2 has an adapter \(Linear\), expected a"
        with pytest.raises(CacheError, match=message):
            filled(tmp_path, model, ragged())
        model.merge_adapter()  # still there
        with pytest.raises(CacheError, match=message):
            filled(tmp_path, model, ragged())
        assert not list(tmp_path.iterdir())
        model = model.unload()
    plain, rows = filled(tmp_path / "plain", tiny("bert"), ragged())
    cache, again = filled(tmp_path, model, ragged())
    assert cache.identity == plain.identity and rows == again


def test_a_padding_id_counts_where_positions_do():
    assert PAD == 0 and digest(tiny("bert")) == digest(tiny("bert", pad_token_id=3))
    assert digest(tiny("roberta")) != digest(tiny("roberta", pad_token_id=3))
    # (Its code takes 1 for it, whatever the config says.)
    assert digest(tiny("mpnet")) == digest(tiny("mpnet", pad_token_id=3))


SHARED = [
    ("deberta", "encoder.rel_embeddings.weight"),
    ("deberta-v2", "encoder.rel_embeddings.weight"),
    ("deberta-v2", "encoder.LayerNorm.weight"),
    ("deberta-v2", "encoder.LayerNorm.bias"),
    ("mpnet", "encoder.relative_attention_bias.weight"),
]


@pytest.mark.parametrize(("family", "name"), SHARED)
def test_what_all_layers_share_counts(family, name, tmp_path):
    """Tables beside the list of layers act below the cut as well as above it."""
    model, other = tiny(family), tiny(family)
    assert digest(model) == digest(other)
    cache, rows = filled(tmp_path, model, ragged())
    with torch.no_grad():
        table = other.get_parameter(name)
        table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    assert digest(model) != digest(other)
    with pytest.raises(CacheError, match="expected of this model"):
        cache.ensure(other, ragged())
    mine, own = filled(tmp_path, other, ragged())
    assert_rows(mine, own, [alone(other, example, K) for example in ragged()])
    assert not torch.allclose(mine.read(own).hidden, cache.read(rows).hidden, atol=1e-4)
    adapted = get_peft_model(model, lpt(insertion_layer=K))
    find_backbone(adapted)[1].get_parameter(name).requires_grad_(True)
    with pytest.raises(CacheError, match=rf"The weight {name} at or below layer 2 trains"):
        ActivationCache.open(tmp_path, adapted)

"""Late LoRA without a prompt is PEFT's LoRA of the same modules, farther than test_late_lora.py:
heads that train with it, first numbers from one seed, and which modules a name means.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lpt_fast.backbone.families import find_backbone
from lpt_fast.backbone.low_rank import LowRank
from tests.adapters import lpt, stir
from tests.method.cases import assert_equal_runs, run, text_batch
from tests.tiny import CAUSAL, FAMILIES, LAYERS, tiny

ALONE = {"generator": "none", "upper": "padded"}
ALL = {"lora_target_modules": "all-linear"}
R = 3


def late_of(model):
    return find_backbone(model)[1].late_prompt


def alone(base, task=None, **config):
    """A copy of a base model with late LoRA alone."""
    config = {**ALONE, "lora_r": R, "insertion_layer": 2, **config}
    torch.manual_seed(7)
    return get_peft_model(copy.deepcopy(base), lpt(task_type=task, **config)).eval()


def full_names(model) -> dict[str, LowRank]:
    """Name of the updated module in the base model -> update."""
    name, backbone, family = find_backbone(model.get_base_model())
    prefix = ".".join(part for part in (name, family.layers) if part)
    updates = backbone.late_prompt.updates("default")
    return {f"{prefix}.{i}.{n}": u for i, own in updates.items() for n, u in own.items()}


def with_peft(base, ours, seed=3, **config):
    """PEFT's own LoRA of the modules that `ours` updates, moved as by training, and `ours` with the
    same weights. Also PEFT's name of each of our parameters.
    """
    updates = full_names(ours)
    settings = ours.peft_config["default"]
    wanted = "|".join(map(re.escape, updates))
    alpha = 2 * R if settings.lora_alpha is None else settings.lora_alpha
    lora = LoraConfig(
        r=R,
        lora_alpha=alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=wanted,
        modules_to_save=settings.modules_to_save,
        **config,
    )
    theirs = get_peft_model(copy.deepcopy(base), lora).eval()
    stir(theirs, seed)
    weights = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    names = {}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            match = re.search(r"\.lpt_lora\.default\.(\d+\.)(.*)\.(lora_[AB])\.weight$", name)
            if match:
                ending = f".{match[1]}{match[2]}.{match[3]}.default.weight"
                (there,) = [n for n in weights if n.endswith(ending)]
            else:
                there = name
            names[name] = there
            with torch.no_grad():
                p.copy_(weights[there])
    assert sorted(names.values()) == sorted(weights) and len(names) >= 2 * len(updates)
    return theirs, names


def labels_of(kind, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if kind == "SEQ_CLS":
        return {"labels": torch.tensor([0, 1, 1, 0, 1])}
    if kind == "TOKEN_CLS":
        return {"labels": (ids % 2).masked_fill(~mask, -100)}
    if kind == "QUESTION_ANS":
        at = inputs["attention_mask"].sum(1) - 1
        return {"start_positions": at // 2, "end_positions": at}
    return {"labels": ids.masked_fill(~mask, -100)} if kind in ("CAUSAL_LM", "MASKED_LM") else {}


OTHER_HEADS = [
    ("roberta", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "MASKED_LM"),
    ("modernbert", "MASKED_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("opt", "CAUSAL_LM"),
    ("gemma2", "CAUSAL_LM"),
    ("qwen3", "CAUSAL_LM"),
    ("t5", "base"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "SEQ_CLS") for family in FAMILIES), *OTHER_HEADS]
)
def test_equals_pefts_own(family, kind):
    """With its head, which trains too; of dropout nothing is left in eval mode."""
    base = tiny(family, kind)
    task = None if kind in ("base", "MASKED_LM") else kind
    ours = alone(base, task, insertion_layer=LAYERS - 1, lora_alpha=5, lora_dropout=0.4)
    assert {int(re.search(r"\.(\d+)\.", f".{n}")[1]) for n in full_names(ours)} == {LAYERS - 1}
    theirs, names = with_peft(base, ours)
    inputs = text_batch(family)
    call = {**inputs, **labels_of(kind, inputs)}
    at = None if kind == "SEQ_CLS" else inputs["attention_mask"].bool()
    value, loss, grads = run(theirs, at, **call)
    expected = value, loss, {name: grads[there] for name, there in names.items()}
    assert_equal_runs(run(ours, at, **call), expected)
    # Nothing of it stays behind where the adapter is switched off.
    with ours.disable_adapter():
        got = run_output(ours, inputs)
    torch.testing.assert_close(got, run_output(base, inputs), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def run_output(model, inputs):
    out = model(**inputs)
    return next(
        out[n] for n in ("logits", "start_logits", "last_hidden_state") if out.get(n) is not None
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("upper", ["auto", "padded"])
def test_starts_as_the_base_model(family, upper):
    """A as PEFT draws it (Kaiming-uniform with a = sqrt 5: |A| < 1 / sqrt n), B zero."""
    base = tiny(family, "SEQ_CLS")
    model = alone(base, "SEQ_CLS", lora_r=16, upper=upper, **ALL)
    for update in full_names(model).values():
        a, b = update.lora_A.weight, update.lora_B.weight
        bound = a.shape[1] ** -0.5
        assert not b.any() and a.shape[0] == b.shape[1] == 16
        assert 0.9 * bound < a.abs().max() <= bound and abs(a.mean()) < bound / 5
        assert abs(a.std() / (bound / 3**0.5) - 1) < 0.15  # that of a uniform distribution
    inputs = text_batch(family)
    got = run_output(model, inputs)
    torch.testing.assert_close(got, run_output(base, inputs), atol=1e-5, rtol=1e-5)
    # With a prompt it starts as the prompt alone does.
    prompt = {"generator": "npg", "prompt_dropout": 0.0, "upper": upper}
    torch.manual_seed(7)
    config = lpt(task_type="SEQ_CLS", insertion_layer=2, **prompt)
    plain = get_peft_model(copy.deepcopy(base), config).eval()
    both = alone(base, "SEQ_CLS", **prompt)
    assert torch.equal(run_output(both, inputs), run_output(plain, inputs))


def test_draws_the_numbers_that_peft_draws():
    """From one seed, module by module."""
    layer = torch.nn.Sequential(torch.nn.Linear(24, 8))
    torch.manual_seed(11)
    model = get_peft_model(layer, LoraConfig(r=R, target_modules=["0"]))
    torch.manual_seed(11)
    mine = LowRank(24, 8, R, 6.0)
    assert torch.equal(mine.lora_A.weight, model.base_model.model[0].lora_A["default"].weight)


def test_all_linear_layers_are_the_default():
    config = alone(tiny("bert")).peft_config["default"]
    assert config.lora_target_modules == "all-linear" and config.lora_alpha == 2 * R


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_pefts(family):
    """Of the modules that PEFT's own "all-linear" takes, those above the insertion."""
    base = tiny(family)
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules="all-linear"))
    name, _, line = find_backbone(base)
    prefix = f"{name}.{line.layers}.".lstrip(".")
    found = {
        name.removesuffix(".lora_A").removeprefix("base_model.model.")
        for name, _ in theirs.named_modules()
        if name.endswith(".lora_A")
    }
    above = {n for n in found if n.startswith(prefix) and int(n[len(prefix)]) >= 2}
    assert set(full_names(alone(base, **ALL))) == above and len(above) >= 4


def test_names_are_matched_as_pefts():
    """Endings at a dot, in any layer above; a regular expression for whole names."""
    base = tiny("bert", "SEQ_CLS")
    layer = "bert.encoder.layer"
    for wanted, names in (
        (["query"], ["2.attention.self.query", "3.attention.self.query"]),
        (["3.attention.self.value"], ["3.attention.self.value"]),
        (["output.dense"], [f"{i}.{n}output.dense" for i in (2, 3) for n in ("attention.", "")]),
        (["3.output.dense", "query"], ["2.attention.self.query", "3.attention.self.query",
                                       "3.output.dense"]),
        (r".*\.layer\.3\..*(query|key)", ["3.attention.self.query", "3.attention.self.key"]),
        (r"bert\.encoder\.layer\.\d\.intermediate\.dense", ["2.intermediate.dense",
                                                            "3.intermediate.dense"]),
    ):  # fmt: skip
        ours = alone(base, "SEQ_CLS", lora_target_modules=wanted)
        assert set(full_names(ours)) == {f"{layer}.{n}" for n in names}
        theirs = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=wanted))
        found = {n for n, _ in theirs.named_modules() if n.endswith(".lora_A")}
        found = {n.removeprefix("base_model.model.").removesuffix(".lora_A") for n in found}
        assert {n for n in found if n[len(layer) + 1] in "23"} == set(full_names(ours))


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama", "t5"])
def test_dropout_falls_on_what_the_updates_read(family):
    """In training alone; the frozen product sees all."""
    more = {"dropout_rate": 0.0} if family == "t5" else {}  # (its decoder's, no module)
    model = alone(tiny(family, "SEQ_CLS", **more), "SEQ_CLS", lora_dropout=0.5, **ALL)
    stir(model)
    inputs = text_batch(family)
    first = run_output(model, inputs)
    assert torch.equal(run_output(model, inputs), first)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p != 0.5:
            module.p = 0.0
    drawn = [run_output(model, inputs) for _ in range(2)]
    assert not torch.equal(*drawn) and not torch.equal(drawn[0], first)
    for update in full_names(model).values():
        torch.nn.init.zeros_(update.lora_B.weight)
    drawn = [run_output(model, inputs) for _ in range(2)]
    torch.testing.assert_close(*drawn, atol=0, rtol=0)


@pytest.mark.parametrize("family", CAUSAL)
def test_a_causal_model_stays_causal(family):
    """Without a prompt, that a text goes on changes nothing of what was there."""
    model = alone(tiny(family, "CAUSAL_LM"), "CAUSAL_LM", **ALL)
    stir(model)
    ids = torch.randint(3, 90, (2, 9))
    long = run_output(model, {"input_ids": ids})
    short = run_output(model, {"input_ids": ids[:, :6]})
    torch.testing.assert_close(long[:, :6], short, atol=1e-5, rtol=1e-5)

"""Agreement with the authors' own program: tensors that it made, in shared/golden (not part of
the repository).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaForMaskedLM

from lpt_fast import LPTConfig

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@pytest.mark.parametrize("kind", ["npg", "mppg"])
def test_agrees_with_the_authors_program(kind):
    path = GOLDEN / f"roberta_{kind}.safetensors"
    if not path.exists():
        pytest.skip("shared/golden is not here")
    with safe_open(path, "pt") as f:
        meta = f.metadata()
        t = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    whole = {k: int(v) for k, v in meta.items() if v.isdigit()}
    ours = {k: whole.pop(k) for k in ("insertion_layer", "num_virtual_tokens", "bottleneck_size")}
    config = RobertaConfig(
        **whole,
        hidden_act=meta["hidden_act"],
        layer_norm_eps=float(meta["layer_norm_eps"]),
    )
    model = RobertaForMaskedLM(config)
    weights = {k.removeprefix("model."): v for k, v in t.items() if k.startswith("model.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("lm_head.decoder") for name in missing)  # tied
    model = get_peft_model(model, LPTConfig(generator=meta["generator"], **ours)).eval()
    generator = model.get_base_model().roberta.late_prompt.lpt_generator["default"]
    generator.load_state_dict(
        {k.removeprefix("generator."): v for k, v in t.items() if k.startswith("generator.")}
    )
    logits = model(input_ids=t["input_ids"], attention_mask=t["attention_mask"]).logits
    at_mask = logits[torch.arange(len(logits)), t["mask_pos"]]
    loss = F.cross_entropy(at_mask, t["labels"])
    loss.backward()
    torch.testing.assert_close(at_mask, t["logits_at_mask"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, t["loss"], atol=1e-5, rtol=0)
    for name, p in generator.named_parameters():
        golden = t[f"grad.{name}"]
        assert (p.grad - golden).norm() <= 1e-5 * golden.norm(), name

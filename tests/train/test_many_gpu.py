"""ManyTrainer on a GPU: `pytest -m gpu tests/train/test_many_gpu.py`. Each adapter becomes what
LPTTrainer makes of it alone there. (SGD: its weights are sums of gradients.)
"""

from __future__ import annotations

import pytest
import torch

from tests.train.cases import cached, rows
from tests.train.test_many import CONFIGS, many, several, with_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("from_cache", [True, False], ids=["cache", "text"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "llama"])
def test_equals_single_trainings(tmp_path, family, from_cache, bf16):
    singles, model = several(family)
    start = {
        name: {key: p.detach().clone() for key, p in with_names(model, name).items()}
        for name in CONFIGS
    }
    how = {"use_cpu": False, "bf16": bf16, "optim": "sgd", "max_grad_norm": 0.3, "seed": 5}
    how |= {"eval_dataset": rows(9, seed=2)}
    trainer = many(model, tmp_path / "many", tmp_path / "cache" if from_cache else None, **how)
    for group in trainer.create_optimizer().param_groups:
        group["lr"] = group["initial_lr"] = 0.1
    trainer.train()
    total = trainer.evaluate()["eval_loss"]
    losses = []
    for name, single in singles.items():
        alone = cached(single, tmp_path / name, tmp_path / "cache", learning_rate=0.1, **how)
        alone.train()
        losses.append(alone.evaluate()["eval_loss"])
        wanted = dict(single.named_parameters())
        for key, p in with_names(model, name).items():
            was = start[name][key].to(p.device)
            moved = float((wanted[key] - was).detach().norm())
            assert (p - wanted[key]).norm() <= (0.1 if bf16 else 1e-3) * moved + 1e-5, (name, key)
    assert total == pytest.approx(sum(losses), rel=2e-2 if bf16 else 1e-4)

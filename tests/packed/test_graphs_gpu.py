"""CUDA graphs of the packed layers as a GPU captures them (test_graphs.py imitates them):
`pytest -m gpu tests/packed/test_graphs_gpu.py`, less than a minute. Gradients are compared, not
weights:
AdamW makes a whole step of a gradient that is nothing but rounding.
"""

from __future__ import annotations

import gc
import logging
import threading
from contextlib import contextmanager

import pytest
import torch
from transformers import TrainerCallback

from lpt_fast.backbone.families import find_backbone
from lpt_fast.packed import graph_passes, graphs
from lpt_fast.packed.graphs import UpperGraphs
from tests.method.cases import M, cached
from tests.packed.cases import labels_for, pair, still
from tests.tiny import batch
from tests.train.cases import cached as cached_trainer
from tests.train.cases import model_of, trained
from tests.train.cases import rows as text_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
# Two buckets, and in each a longer batch and a shorter one.
LENGTHS = ((9, 4, 7, 1, 3), (9, 9, 9, 4, 1), (9, 4, 3, 1, 3), (9, 9, 8, 4, 2))
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(graphs, "STEP", 16)


def on_gpu(family, dtype, head="SEQ_CLS", **config):
    """A model in training mode, and batches for it with labels; the generator stays in fp32."""
    base, model = pair(family, head, dtype, **config)
    late = find_backbone(model)[1].late_prompt
    late.upper = "packed"
    calls = []
    for lengths in LENGTHS:
        inputs = batch(lengths=lengths)
        rows = cached(base, inputs, room=0 if config.get("generator") == "none" else M)
        labels = {n: x.cuda() for n, x in labels_for(head, inputs).items()}
        calls.append({"cached_hidden": rows.to("cuda"), **labels})
    model.cuda()
    late.lpt_generator.float()
    late.lpt_lora.float()
    stir_updates(model)
    return model, late, calls


def stir_updates(model):
    """Late LoRA's B away from zero, where A would have no gradient."""
    torch.manual_seed(12)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape) * 0.05)


def step(model, call, autocast=None):
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        out = model(**call)
    out.loss.backward()
    return out.logits


def gradients(model) -> dict:
    return {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}


def accumulated(model, calls, autocast=None) -> tuple[dict, list]:
    """Gradients of all calls, and the logits of each, which are kept until the end."""
    model.zero_grad()
    logits = [step(model, call, autocast) for call in calls]
    return gradients(model), [x.detach().double().cpu() for x in logits]


def exactly(call) -> dict:
    """The same on the CPU, in fp64."""
    rows = call["cached_hidden"].to("cpu").to(torch.float64)
    return {n: x.cpu() for n, x in call.items() if n != "cached_hidden"} | {"cached_hidden": rows}


def by_place(gradients: dict) -> dict:
    """Those of the prompt, of late LoRA and of the head, each as one vector: a matrix of late
    LoRA's alone is so small that its rounding in bf16 differs by more than twice by chance."""
    places: dict = {"lpt_generator": [], "lpt_lora": [], "head": []}
    for name, gradient in sorted(gradients.items()):
        place = next((p for p in places if p in name), "head")
        places[place].append(gradient.flatten())
    return {place: torch.cat(parts) for place, parts in places.items() if parts}


def errors_of(got: dict, truth: dict) -> torch.Tensor:
    return torch.tensor([float((got[n] - g).norm()) for n, g in truth.items()])


@pytest.mark.parametrize("head", ["SEQ_CLS", "TOKEN_CLS"])
@pytest.mark.parametrize(
    ("weights", "autocast"), [(FP32, None), (BF16, None), (BF16, BF16), (FP32, BF16)]
)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_accumulated_gradients(family, weights, autocast, head):
    assert_right(family, weights, autocast, head)


@pytest.mark.parametrize("generator", ["mppg", "none"])
@pytest.mark.parametrize(
    ("weights", "autocast"), [(FP32, None), (BF16, None), (BF16, BF16), (FP32, BF16)]
)
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_late_lora(family, weights, autocast, generator):
    """Beside the prompt and alone."""
    updates = {"lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
    assert_right(family, weights, autocast, "SEQ_CLS", generator=generator, **updates)


def assert_right(family, weights, autocast, head, **config):
    """Of four batches in two buckets, with evaluation between: no farther from fp64 than twice the
    way without graphs."""
    model, late, calls = on_gpu(family, weights, head, **config)
    still(model)
    exact = still(pair(family, head, torch.float64, **config)[1])
    exact.load_state_dict(model.state_dict())
    find_backbone(exact)[1].late_prompt.upper = "packed"
    truth, _ = accumulated(exact, [exactly(call) for call in calls])
    plain, plain_logits = accumulated(model, calls, autocast)
    late.graphs = UpperGraphs(late)
    for call in calls * 2:  # until there are graphs
        step(model, call, autocast)
        model.eval()
        with torch.no_grad():
            model(**call)
        model.train()
    assert len(late.graphs) == 2
    before = late.graphs.replayed
    got, logits = accumulated(model, calls, autocast)
    assert late.graphs.replayed == before + 4
    (casts,) = {bucket.autocast for bucket in late.graphs._made}
    assert casts == (autocast if weights == FP32 else None)
    if "lora_r" in config:
        truth, plain, got = map(by_place, (truth, plain, got))
    sizes = torch.tensor([float(g.norm()) for g in truth.values()])
    fine = 2**-8 if BF16 in (weights, autocast) else 2**-20
    errors = errors_of(got, truth), errors_of(plain, truth)
    assert (errors[0] <= 2 * errors[1] + fine * sizes + 1e-7 * sizes.max()).all(), errors
    for a, b in zip(logits, plain_logits, strict=True):
        torch.testing.assert_close(a, b, atol=8 * fine, rtol=8 * fine)


@pytest.mark.parametrize("generator", ["static", "npg", "none"])
def test_dropout_is_drawn_by_each_replay(generator):
    """As without graphs from the same seed, and not the same mask twice. Without a prompt, late
    LoRA's own, which is also drawn for filler texts: other masks than without graphs."""
    alone = generator == "none"
    more = {"lora_r": 4, "lora_dropout": 0.5} if alone else {}
    model, late, calls = on_gpu("bert", FP32, generator=generator, **more)
    still(model)
    if alone:
        for update in late.lpt_lora["default"].modules():
            if isinstance(update, torch.nn.Dropout):
                update.p = 0.5
    else:
        late.lpt_generator["default"].dropout.p = 0.5
    ends = []
    for by_graphs in (False, True):
        late.graphs = UpperGraphs(late) if by_graphs else None
        torch.manual_seed(5)
        ends.append([accumulated(model, calls[:1])[0] for _ in range(7)])
    assert late.graphs.replayed == 7 - graphs.WORTH
    for got, plain in [] if alone else zip(*reversed(ends), strict=True):
        sizes = [g.norm() for g in plain.values()]
        assert (errors_of(got, plain) <= 1e-4 * torch.tensor(sizes) + 1e-6 * max(sizes)).all()
    for a, b in zip(ends[1], ends[1][1:], strict=False):
        assert any((a[n] - b[n]).norm() > 1e-2 * b[n].norm() for n in a)


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2", "qwen3"])
def test_a_step_waits_for_nothing(family, autocast):
    """No copy from the host and no look at the device."""
    model, late, calls = on_gpu(family, BF16)
    late.graphs = UpperGraphs(late)
    for call in calls * 2:
        step(still(model), call, autocast)
    assert len(late.graphs) == 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            step(model, call, autocast)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert late.graphs.replayed == 8


def test_a_capture_that_breaks_off(monkeypatch, caplog):
    """One warning; gradients are right, and dropout still draws."""
    model, late, calls = on_gpu("bert", FP32)
    plain, _ = accumulated(still(model), calls)
    run, looked = graphs.run_packed, []

    def looks(*args, **named):
        out = run(*args, **named)
        looked.append(float(out.sum()) if torch.cuda.is_current_stream_capturing() else None)
        return out

    monkeypatch.setattr(graphs, "run_packed", looks)
    late.graphs = UpperGraphs(late)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            got, _ = accumulated(model, calls)
    assert len(looked) >= graph_passes.WARM_UP
    assert late.graphs.replayed == 0 == len(late.graphs)
    words = [r.getMessage() for r in caplog.records if r.name == "lpt_fast.packed.graphs"]
    assert len(words) == 1 and "without graphs" in words[0]
    sizes = torch.tensor([float(g.norm()) for g in plain.values()])
    assert (errors_of(got, plain) <= 1e-4 * sizes + 1e-6 * sizes.max()).all()
    first, second = torch.rand(8, device="cuda"), torch.rand(8, device="cuda")
    assert not torch.equal(first, second)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    late.lpt_generator["default"].dropout.p = 0.5
    step(model, calls[0])
    # And other graphs can be made.
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "STEP", 16)
    late.graphs = UpperGraphs(late)
    for _ in range(4):
        step(model, calls[0])
    assert late.graphs.replayed == 2


def test_another_thread_may_pin_memory():
    """As the one that reads the cache ahead does."""
    model, late, calls = on_gpu("bert", BF16)
    end, made = threading.Event(), []

    def pins():
        stream = torch.cuda.Stream()
        while not end.is_set():
            with torch.cuda.stream(stream):
                host = torch.empty(1 << 20 | len(made) << 12, dtype=torch.uint8, pin_memory=True)
                made.append(host.to("cuda", non_blocking=True)[0])

    thread = threading.Thread(target=pins)
    thread.start()
    try:
        late.graphs = UpperGraphs(late)
        for call in calls * 2:
            step(still(model), call)
    finally:
        end.set()
        thread.join()
    assert len(late.graphs) == 2 and late.graphs.replayed == 4 and made


def test_memory_is_shared_and_given_back():
    def allocated():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    model, late, calls = on_gpu("bert", BF16)
    model.zero_grad()
    before = allocated()
    late.graphs = UpperGraphs(late)
    for call in calls * 2:
        step(still(model), call)
    assert len(late.graphs) == 2
    model.zero_grad()
    held = allocated()
    late.graphs = None
    after = allocated()
    # (cuBLAS keeps its working memory, tens of MiB a stream.)
    assert after <= held and after - before < 1 << 27


def test_ddp_of_one_process(tmp_path):
    """Its hooks fire on gradients that come by graphs; micro-batches without communication too."""
    dist = torch.distributed
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, late, calls = on_gpu("bert", FP32)
        plain, _ = accumulated(still(model), calls)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        late.graphs = UpperGraphs(late)
        for _ in range(4):
            model.zero_grad()
            for i, call in enumerate(calls):
                with wrapped.no_sync() if i < 3 else _nothing():
                    step(wrapped, call)
        assert len(late.graphs) == 2
        got = gradients(model)
        sizes = torch.tensor([float(g.norm()) for g in plain.values()])
        assert (errors_of(got, plain) <= 1e-4 * sizes + 1e-6 * sizes.max()).all()
    finally:
        dist.destroy_process_group()


@contextmanager
def _nothing():
    yield


class _Watch(TrainerCallback):
    def __init__(self):
        self.graphs: UpperGraphs | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.graphs = find_backbone(model)[1].late_prompt.graphs


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("family", "updates"), [("bert", {}), ("gpt2", {}), ("mpnet", {"lora_r": 4})]
)
def test_a_training_by_graphs(family, updates, bf16, tmp_path):
    """The default on a GPU: accumulation, evaluation between, a checkpoint and going on from it.
    (SGD: its weights are sums of gradients.)"""
    settings = {
        "use_cpu": False,
        "bf16": bf16,
        "optim": "sgd",
        "learning_rate": 0.1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 6,
        "eval_dataset": text_rows(16, seed=1),
    }
    ends, start = [], trained(model_of(family, **updates))
    for wanted, resume in ((False, None), (None, None), (None, "checkpoint-6")):
        model, watch = model_of(family, **updates), _Watch()
        folder = tmp_path / ("plain" if wanted is False else "graphs")
        trainer = cached_trainer(model, folder, tmp_path / "cache", callbacks=[watch], **settings)
        trainer._cuda_graphs = wanted
        trainer.train(resume_from_checkpoint=resume and str(folder / resume))
        assert find_backbone(model)[1].late_prompt.graphs is None
        assert (watch.graphs is None) == (wanted is False)
        assert watch.graphs is None or watch.graphs.replayed > 2
        ends.append({n: p.cpu() for n, p in trained(model).items()})
    for end in ends[1:]:
        for name, value in end.items():
            moved = float((ends[0][name] - start[name]).norm())
            assert (value - ends[0][name]).norm() <= (0.1 if bf16 else 1e-3) * moved + 1e-6, name

"""python -m bench many: texts a second for many tasks on one frozen encoder, beside LoRA adapters
switched by set_adapter (as users do it), PEFT's own mixed batches and a model for each task.

Each contestant gives the class probabilities of all tasks for all texts, tokenised already, in
batches sorted by length. Adapters have random weights, of the sizes that training would give them.
Who does not give what its adapters give one by one, padded, in fp32, gets no figure.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import typer

from ..paths import RESULTS

GATE_TEXTS = 12
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # probabilities
LAYERS = {"minilm": 4, "roberta-base": 9, "roberta-large": 18}  # of insertion
TARGETS = {"minilm": 2.5, "roberta-base": 3.0}  # over LoRA, at 20 tasks, on a CPU
_LORA = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16}


@dataclass
class Job:
    """Texts for all tasks.

    Attributes:
        base: an encoder with a head; not changed.
        tasks: how many.
        k: insertion layer of the late prompts.
        examples: tokenised texts.
        tokenizer: of them.
        batch: texts of a batch of those who do not choose themselves.
        device: where all run.
    """

    base: torch.nn.Module
    tasks: int
    k: int
    examples: list[dict]
    tokenizer: object
    batch: int = 32
    device: str = "cpu"

    @property
    def names(self) -> list[str]:
        return ["default", *(f"task{i}" for i in range(1, self.tasks))]

    @cached_property
    def order(self) -> list[int]:
        return sorted(range(len(self.examples)), key=lambda i: -len(self.examples[i]["input_ids"]))

    def batches(self):
        """Numbers of texts, and their padded inputs."""
        for start in range(0, len(self.order), self.batch):
            own = self.order[start : start + self.batch]
            ids = [{"input_ids": self.examples[i]["input_ids"]} for i in own]
            yield own, dict(self.tokenizer.pad(ids, return_tensors="pt").to(self.device))

    def some(self, count: int) -> Job:
        """The same with a few of the texts."""
        step = max(1, len(self.examples) // count)
        return replace(self, examples=self.examples[::step][:count])


def _adapted(job: Job, config, dtype=torch.float32):
    """A copy of the base model with an adapter a task, moved as by training."""
    from peft import get_peft_model

    model = get_peft_model(copy.deepcopy(job.base), config())
    for name in job.names[1:]:
        model.add_adapter(name, config())
    own = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "late_prompt", "modules_to_save")):
                p.add_(torch.randn(p.shape, generator=own) * 0.02)
    return model.eval().to(job.device, dtype)


def _lora_config(heads: list[str]):
    from peft import LoraConfig

    return LoraConfig(**_LORA, target_modules=["query", "value"], modules_to_save=heads)


def _heads(job: Job) -> list[str]:
    from lpt_fast.backbone.families import find_backbone, head_modules

    return head_modules(job.base, *find_backbone(job.base))


def lora_switched(job: Job, dtype=torch.float32):
    """One model, set_adapter for each task."""
    model = _adapted(job, partial(_lora_config, _heads(job)), dtype)

    def run(job: Job) -> np.ndarray:
        out = np.zeros((job.tasks, len(job.examples), model.config.num_labels), "f4")
        for t, name in enumerate(job.names):
            model.set_adapter(name)
            for own, inputs in job.batches():
                out[t, own] = model(**inputs).logits.float().softmax(-1).cpu().numpy()
        return out

    return run, partial(_one_by_one, copy.deepcopy(model).float()), model


def lora_mixed(job: Job):
    """PEFT's adapter_names: each text once a task. (Heads can be linear layers alone.)"""
    model = _adapted(job, partial(_lora_config, ["classifier"]))

    def run(job: Job) -> np.ndarray:
        out = np.zeros((job.tasks, len(job.examples), model.config.num_labels), "f4")
        for own, inputs in job.batches():
            inputs = {name: x.repeat(job.tasks, 1) for name, x in inputs.items()}
            names = [name for name in job.names for _ in own]
            made = model(**inputs, adapter_names=names).logits.softmax(-1)
            out[:, own] = made.view(job.tasks, len(own), -1).cpu().numpy()
        return out

    return run, partial(_one_by_one, model), model


def separate(job: Job):
    """A whole model for each task, its LoRA merged."""
    models = []
    for i in range(job.tasks):
        one = replace(job, tasks=1)
        torch.manual_seed(i)
        models.append(_adapted(one, partial(_lora_config, _heads(job))).merge_and_unload())

    def run(job: Job) -> np.ndarray:
        out = np.zeros((job.tasks, len(job.examples), models[0].config.num_labels), "f4")
        for t, model in enumerate(models):
            for own, inputs in job.batches():
                out[t, own] = model(**inputs).logits.softmax(-1).cpu().numpy()
        return out

    def alone(job: Job) -> np.ndarray:
        return np.stack([_one_by_one(model, job, [None])[0] for model in models])

    return run, alone, torch.nn.ModuleList(models)


def ours(job: Job, dtype=torch.float32, **config):
    """Late prompts of all tasks, in one pass."""
    from lpt_fast import LPTConfig
    from lpt_fast.cli.all_tasks import Classifiers
    from lpt_fast.train.trainer import find_late_prompt

    settings = {"insertion_layer": job.k, "generator": "mppg", "num_virtual_tokens": 10, **config}
    model = _adapted(job, lambda: LPTConfig(task_type="SEQ_CLS", **settings), dtype)
    loaded = Classifiers.of_model(model, job.tokenizer)

    def run(job: Job) -> np.ndarray:
        found = loaded.of_examples(list(range(job.tasks)), job.examples)
        return np.stack(list(found.values()))

    whole = copy.deepcopy(model).float()
    find_late_prompt(whole).upper = "padded"
    return run, partial(_one_by_one, whole), model


def _one_by_one(model, job: Job, names: list | None = None) -> np.ndarray:
    """Each adapter on each text alone."""
    names = names or job.names
    out = np.zeros((len(names), len(job.examples), model.config.num_labels), "f4")
    for t, name in enumerate(names):
        if name is not None:
            model.set_adapter(name)
        for i, example in enumerate(job.examples):
            ids = torch.tensor([example["input_ids"]], device=job.device)
            out[t, i] = model(input_ids=ids).logits.softmax(-1)[0].cpu().numpy()
    return out


LATE_LORA = {"generator": "none", "num_virtual_tokens": 10, "lora_r": 8}
CONTESTANTS: dict[str, Callable] = {
    "LoRA, set_adapter, fp32": lora_switched,
    "LoRA, set_adapter, bf16": partial(lora_switched, dtype=torch.bfloat16),
    "LoRA, adapter_names, fp32": lora_mixed,
    "a merged model a task, fp32": separate,
    "late prompts, fp32": ours,
    "late prompts, bf16": partial(ours, dtype=torch.bfloat16),
    "late LoRA, fp32": partial(ours, **LATE_LORA),
    "late LoRA, bf16": partial(ours, dtype=torch.bfloat16, **LATE_LORA),
}
FIRST = next(iter(CONTESTANTS))


def main(
    data: str = typer.Option(
        ..., "--data", help="Folder with a folder of train/dev/test .tsv for each task."
    ),
    encoder: str = typer.Option(
        "minilm", "--encoder", help=f"Of {', '.join(LAYERS)}; random but the first."
    ),
    model: str = typer.Option(None, "--model", help="Another encoder than minilm."),
    k: int = typer.Option(None, "--k", help="Insertion layer. Default: 4 of 6, 9 of 12, 18 of 24."),
    tasks: str = typer.Option("1,5,20", "--tasks", help="How many adapters."),
    rows: int = typer.Option(256, "--rows", help="Texts, of Subj's test set."),
    rounds: int = typer.Option(3, "--rounds", help="In which all take their turn."),
    batch: int = typer.Option(32, "--batch", help="Texts of a batch of who does not choose."),
    device: str = typer.Option("cpu", "--device", help="cpu or cuda."),
    contestants: str = typer.Option(
        ";".join(CONTESTANTS), "--contestants", help="With semicolons between."
    ),
    out: str = typer.Option(
        str(RESULTS / "many.jsonl"), "--out", help="JSON lines are appended to it."
    ),
) -> None:
    """Texts a second for many tasks on one encoder, and how many times LoRA's."""
    from ..data import Recorder, Source, ends_where_wrong, quiet

    quiet()
    names = contestants.split(";")
    if set(names) - set(CONTESTANTS) or encoder not in LAYERS:
        raise typer.BadParameter(
            f"--contestants are of {'; '.join(CONTESTANTS)}; --encoder of {', '.join(LAYERS)}."
        )
    source = Source(Path(data), model)
    examples, _ = source.labelled("subj", "test", rows)
    base, depth = _encoder(encoder, source)
    k = k or LAYERS[encoder]
    common = {"encoder": encoder, "k": k, "depth": depth, "texts": len(examples), "batch": batch}
    record = Recorder(out, common)
    for count in map(int, tasks.split(",")):
        with ends_where_wrong("many"), torch.inference_mode():
            job = Job(base, count, k, examples, source.tokenizer, batch, device)
            _compare(job, names, rounds, record, encoder)


def _encoder(name: str, source):
    from transformers import AutoModelForSequenceClassification, RobertaConfig

    from .models import SHAPES

    if name == "minilm":
        made = AutoModelForSequenceClassification.from_pretrained(source.model_name)
        return made, made.config.num_hidden_layers
    depth, width, heads, inner = SHAPES[name]
    config = RobertaConfig(
        vocab_size=len(source.tokenizer),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=source.tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config), depth


def _compare(job: Job, names: list[str], rounds: int, record, encoder: str) -> None:
    from ..data import Figure, require

    runs, size = {}, {}
    for name in names:
        if name == "LoRA, adapter_names, fp32" and encoder != "minilm":
            typer.echo(f"{name}: left out, PEFT mixes heads that are linear layers alone")
            continue
        run, alone, model = CONTESTANTS[name](job)
        some = job.some(GATE_TEXTS)
        dtype = next(model.parameters()).dtype
        wrong = float(np.abs(run(some) - alone(some)).max())
        require(wrong <= CLOSE[dtype], f"{name}: probabilities differ by {wrong:.2g}")
        runs[name] = run
        size[name] = sum(p.nbytes for p in model.parameters()) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in order:
            start = time.perf_counter()
            runs[name](job)
            seconds[name].append(time.perf_counter() - start)
    took = {name: statistics.median(found) for name, found in seconds.items()}
    for name, one in took.items():
        details = {"tasks": job.tasks, "weights_mib": round(size[name], 1)}
        value = len(job.examples) / one
        record(Figure(f"{job.tasks}", name, value, "texts/s", details=details))
        if name != FIRST and FIRST in took:
            aimed = job.tasks == 20 and job.device == "cpu" and name.startswith("late")
            target = TARGETS.get(encoder) if aimed else None
            what = f"{name}, over {FIRST}"
            ratio = took[FIRST] / one
            details = {"tasks": job.tasks}
            record(Figure(f"{job.tasks}", what, ratio, "x", target, True, details))

"""The settings of `lpt-fast precompute`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from .arguments import FORMULATIONS, TORCH_DTYPES, DataArguments, one_of, option, path

STORES = ("bf16", "fp32", "fp16", "int8c", "fp8")


@dataclass
class PrecomputeArguments(DataArguments):
    """Settings of `lpt-fast precompute`. What changes a text's tokens has the names and defaults
    of `lpt-fast train`, which then finds them.
    """

    model: str | None = path(None, "Model: a hub name or a local folder.", "Model")
    torch_dtype: str = option(
        "float32", "Dtype of the frozen model: float32, bfloat16 or float16.", "Model"
    )
    insertion_layer: str | None = option(
        None,
        "k: after how many layers to cut; several with commas between (12,16,20) are filled in one "
        "pass. Default: half.",
        "Model",
    )
    compute_dtype: str | None = option(
        None, "bfloat16 or float16: run under autocast. Default: as the model is.", "Model"
    )

    formulation: str = option(
        "classification", "'classification' or 'cloze' (the task's template is put in).", "Data"
    )
    task: str | None = path(
        None, "One of the paper's tasks (sst2, mpqa, ...) or your own YAML file.", "Data"
    )
    dataset: str | None = path(
        None, "A hub data set such as glue/sst2, or a folder; all its splits are read.", "Data"
    )
    train_file: str | None = path(None, "csv, tsv, json, jsonl or parquet file.", "Data")
    validation_file: str | None = path(None, "The same.", "Data")
    test_file: str | None = path(None, "The same.", "Data")

    out: str | None = path(None, "Folder of caches; made where there is none.", "Cache")
    store: str = option("bf16", f"How rows are kept: {', '.join(STORES)}.", "Cache")
    max_cache_gb: float | None = option(
        None, "Most GB (10^9 bytes) that one cache may take. Default: what is free.", "Cache"
    )
    shard_mb: float = option(256.0, "MB of a file, at most.", "Cache")
    dry_run: bool = option(
        False,
        "Say what would be computed, how long it takes and whether it pays; write nothing.",
        "Cache",
    )
    num_train_epochs: float = option(
        5.0, "Epochs planned, of all runs together, for --dry_run's advice.", "Cache"
    )

    batch_tokens: int | None = option(
        None, "Tokens of a batch, padding counted. Default: what suits the device.", "Run"
    )
    wait: float = option(0.0, "Seconds to wait while another process builds.", "Run")
    use_cpu: bool = option(False, "Stay on the CPU where there is a GPU.", "Run")

    def __post_init__(self):
        super().__post_init__()
        one_of("formulation", self.formulation, FORMULATIONS)
        one_of("torch_dtype", self.torch_dtype, TORCH_DTYPES)
        one_of("store", self.store, STORES)
        if not self.model:
            raise ValueError(
                "`--model` is missing: give a hub name such as roberta-large, or a local folder."
            )
        if not self.out:
            raise ValueError("`--out` is missing: give a folder for the cache.")
        if not (self.dataset or self.train_file or self.validation_file or self.test_file):
            raise ValueError("There are no texts: give --train_file or --dataset.")
        if self.formulation == "cloze" and not self.task:
            raise ValueError(
                "`--formulation cloze` needs a template: give --task (a name or a YAML)."
            )
        if self.compute_dtype is not None:
            one_of("compute_dtype", self.compute_dtype, TORCH_DTYPES)
        for name in ("max_length", "batch_tokens", "max_cache_gb", "shard_mb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`--{name}` must be above 0, got {value}.")
        self.layers()

    def layers(self) -> list[int] | None:
        """The cuts; None: half the layers."""
        if self.insertion_layer is None:
            return None
        try:
            layers = [int(part) for part in self.insertion_layer.split(",")]
        except ValueError:
            layers = []
        if not layers or min(layers) < 1 or len(set(layers)) != len(layers):
            raise ValueError(
                "`--insertion_layer` must be a layer, or different ones with commas between, got "
                f"{self.insertion_layer!r}."
            )
        return layers

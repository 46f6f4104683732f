"""lpt-fast cache info | verify | gc | export: looking after activation caches."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from .console import clean_errors, table
from .outputs import check_folder

cache_app = typer.Typer(
    no_args_is_help=True,
    help="Look after activation caches: what is in them, whether every byte is right, what can go.",
)

_FOLDER = {"callback": Path.expanduser}
_PATH = typer.Argument(..., help="Folder of caches, or of one cache.", metavar="CACHE", **_FOLDER)
_OUT = typer.Argument(..., help="Folder of caches to copy it to.", metavar="OUT", **_FOLDER)
_IDENTITY = typer.Option(
    None, "--identity", help="Only the cache whose identity begins so (see `info`)."
)


def _folders(path: Path, identity: str | None):
    """The caches at `path` that are meant."""
    from ..cache.errors import CacheError
    from ..cache.folder import Folder, find_folders

    folders = [Folder.read(folder) for folder in find_folders(path)]
    chosen = [f for f in folders if f.identity.digest.startswith(identity or "")]
    if not chosen:
        there = ", ".join(f.identity.digest[:12] for f in folders) or "none"
        raise CacheError(
            f"{path} holds no cache{f' {identity}' if identity else ''}, expected one of: {there}."
        )
    return chosen


@cache_app.command()
def info(
    path: Path = _PATH,
    identity: str = _IDENTITY,
    as_json: bool = typer.Option(False, "--json", help="One JSON object a cache."),
) -> None:
    """What is in it: model, layer, store, rows, tokens, sizes, where it came from."""
    with clean_errors():
        from ..cache.folder import folder_size
        from ..cache.planner import amount
        from ..cache.state import State
        from ..cache.verify import garbage

        for folder in _folders(path, identity):
            state = State(folder).load(adopt=False)
            layouts = [tables.layout for tables in state.shards.values()]
            own = folder.identity
            facts = {
                "path": str(folder.path),
                "identity": own.digest,
                "backbone": own.content.get("backbone"),
                "insertion_layer": own.layer,
                "hidden_size": own.width,
                "compute_dtype": own.compute_dtype,
                "store": own.store,
                "rows": sum(layout.rows for layout in layouts),
                "tokens": sum(layout.tokens for layout in layouts),
                "shards": len(layouts),
                "bytes": folder_size(folder.path),
                "unneeded_files": len(garbage(folder)),
                "problems": state.problems,
                **{f"provenance.{key}": value for key, value in folder.provenance.items()},
            }
            if as_json:
                typer.echo(json.dumps(facts))
                continue
            facts["bytes"] = f"{facts['bytes']:,} ({amount(facts['bytes'])})"
            facts["problems"] = "; ".join(state.problems) or "none"
            shown = [[name.replace("_", " "), str(value)] for name, value in facts.items()]
            width = max(len(name) for name, _ in shown)
            typer.echo("\n".join(f"{name.ljust(width)}  {value}" for name, value in shown) + "\n")


@cache_app.command()
def verify(
    path: Path = _PATH,
    identity: str = _IDENTITY,
    full: bool = typer.Option(False, "--full", help="Every byte of every row, not tables alone."),
    repair: bool = typer.Option(
        False, "--repair", help="Drop the shards that are not sound (implies --full)."
    ),
) -> None:
    """Compare every file with its digests. Exit code 1 when something is wrong."""
    with clean_errors():
        from ..cache.planner import amount
        from ..cache.verify import repair as mend
        from ..cache.verify import verify as look

        rows = [["cache", "shards", "rows", "read", "problems"]]
        problems = []
        for folder in _folders(path, identity):
            report = mend(folder) if repair else look(folder, full)
            counts = (str(report.shards), f"{report.rows:,}", amount(report.bytes))
            rows.append([folder.identity.digest[:12], *counts, str(len(report.problems))])
            problems += report.problems
        typer.echo(table(rows))
        for problem in problems:
            typer.secho(problem, fg="red", err=True)
        if problems and repair:
            typer.echo("Dropped what was wrong; `lpt-fast precompute` makes those rows again.")
        elif problems:
            raise typer.Exit(1)
        elif not (full or repair):
            typer.echo("Headers and tables are sound. --full reads every row too.")


@cache_app.command()
def gc(
    path: Path = _PATH,
    identity: str = _IDENTITY,
    dry_run: bool = typer.Option(False, "--dry_run", help="Say what would go, remove nothing."),
) -> None:
    """Remove unfinished files and shards that no index names."""
    with clean_errors():
        from ..cache.planner import amount
        from ..cache.verify import gc as collect

        for folder in _folders(path, identity):
            names, size = collect(folder, dry_run)
            what = "would be removed" if dry_run else "removed"
            typer.echo(f"{folder.path}: {len(names)} files, {amount(size)} {what}")


@cache_app.command()
def export(
    path: Path = _PATH,
    out: Path = _OUT,
    identity: str = _IDENTITY,
) -> None:
    """Copy caches, checking every byte; the copy needs neither the model nor the texts."""
    with clean_errors():
        check_folder(out, "OUT")
        from ..cache.folder import MANIFEST, Folder
        from ..cache.verify import export as copy

        for folder in _folders(path, identity):
            there = out / folder.identity.folder
            # A copy of several that was interrupted goes on.
            if (there / MANIFEST).exists() and Folder.read(there).read_index() == (
                folder.read_index() or []
            ):
                typer.echo(f"There already: {there}")
                continue
            typer.echo(f"Copied to {copy(folder, out)}")

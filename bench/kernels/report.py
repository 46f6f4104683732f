"""python -m bench report: a results file as Markdown, and whether it reaches the targets."""

from __future__ import annotations

import argparse
from fnmatch import fnmatchcase

from ..paths import RESULTS
from .records import PROVIDERS, latest, read

# The targets: insertion on RoBERTa-large's shapes at 32k tokens, forward and backward alike.
TARGET_SHAPES = "roberta-large-32k-*"
TARGET_OPS = tuple(
    f"insert_{kind}.{what}"
    for kind in ("npg", "appg", "mppg", "static")
    for what in ("fwd", "bwd_weights", "bwd_hidden")
)
SHARE, SPEEDUP = 0.8, 3.0


def _ratio(found: dict, op: str, provider: str) -> float | None:
    """How many times faster the kernels are than a provider."""
    rows = [found.get((op, name)) for name in (provider, "triton")]
    if any(row is None or "ms" not in row for row in rows):
        return None
    return rows[0]["ms"]["p50"] / rows[1]["ms"]["p50"]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ms(row: dict | None) -> str:
    if row is None:
        return "-"
    return f"{row['ms']['p50']:.4g}" if "ms" in row else row["status"]


def _table(lines: list[list[str]]) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(found: dict) -> str:
    """Milliseconds of each provider, speedups and the kernels' bandwidth, a row an operator."""
    heads = ["operator", *(f"{p} ms" for p in PROVIDERS), "eager / triton"]
    heads += ["compile / triton", "GB/s", "share of copy", "peak MB eager", "peak MB triton"]
    lines = [heads]
    for op in dict.fromkeys(op for op, _ in found):
        row = found.get((op, "triton"), {})
        line = [op, *(_ms(found.get((op, p))) for p in PROVIDERS)]
        line += [_cell(_ratio(found, op, p), ".2f") for p in ("eager", "compile")]
        shown = row if "ms" in row else found.get((op, "eager"), {}) if op == "copy" else {}
        line.append(_cell(shown.get("gbps"), ",.0f"))
        line.append("-" if "share" not in shown else f"{100 * shown['share']:.1f} %")
        for provider in ("eager", "triton"):
            peak = found.get((op, provider), {}).get("peak_bytes")
            line.append("-" if peak is None else f"{peak / 2**20:,.0f}")
        lines.append(line)
    return _table(lines)


def verdicts(found: dict) -> list[list[str]]:
    """For each operator that has a target: what was asked, what was measured, PASS or FAIL."""
    lines = []
    for op in TARGET_OPS:
        row = found.get((op, "triton"), {})
        for what, value, fits, form in (
            (f"{100 * SHARE:.0f} % of copy", row.get("share"), lambda v: v >= SHARE, ".1%"),
            (f"{SPEEDUP:g}x over eager", _ratio(found, op, "eager"), lambda v: v >= SPEEDUP, ".2f"),
            ("faster than compile", _ratio(found, op, "compile"), lambda v: v > 1, ".2f"),
        ):
            if row.get("status", "ok") != "ok":
                result = f"FAIL ({row['status']})"
            else:
                result = "not measured" if value is None else "PASS" if fits(value) else "FAIL"
            lines.append([op, what, _cell(value, form), result])
    return lines


def text(path: str) -> str:
    parts = []
    for group, found in latest(read(path)).items():
        machine, shape, dtype, graph = group
        row = next(iter(found.values()))
        how = "CUDA graphs" if graph else "without CUDA graphs"
        head = f"## {shape}, {dtype}: {machine}"
        versions = ", ".join(f"{name} {v}" for name, v in row["versions"].items() if v)
        commits = sorted({row["commit"] for row in found.values()})
        parts += [
            head,
            f"{how if row['device'] == 'cuda' else 'CPU'}; commit {', '.join(commits)};",
        ]
        parts[-1] += f" {versions}."
        parts.append(table(found))
        wrong = [row for row in found.values() if row["status"] != "ok"]
        parts += [f"{r['op']} {r['provider']}: {r['status']}, {r['reason']}" for r in wrong]
        if row["device"] == "cuda" and graph and fnmatchcase(shape, TARGET_SHAPES):
            lines = [["operator", "target", "measured", "verdict"], *verdicts(found)]
            parts += [f"Targets on {shape}:", _table(lines)]
    if not any(part.startswith("Targets") for part in parts):
        parts.append(f"No verdict on the targets: no GPU rows of {TARGET_SHAPES} in {path}.")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--file", default=str(RESULTS / "kernels.jsonl"))
    options = parser.parse_args(arguments)
    try:
        print(text(options.file))
    except ValueError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

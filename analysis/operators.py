"""LoRA operators: the time of one call against its tokens (VaLoRA, figure 17), from the CSV files that measured them.

A file has the columns operator, tokens, us, and may have phase, adapters, rank, slices, skew, d_in, d_out; lines that begin
with # are its provenance.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from analysis.style import GRID, footer, legend, line, places, plain_log, save, sheet
from traces.result_files import ResultError

PAPER = Path(__file__).with_name("paper_operators.csv")
ABOUT = ("what:", "device:", "date:", "versions:")
"""Lines of the provenance that a figure repeats."""
NAMES = {"sglang": "SGLang", "slora": "slora", "punica": "punica", "dlora": "dlora", "vllm": "fcfs", "atmm": "valora"}
"""Operators under the colour of the policy that uses them."""
FIXED = {"rank": 64, "slices": 1, "d_in": 4096, "d_out": 4096, "skew": "uniform"}
"""Of several values in a file the one nearest to the paper's set-up is drawn."""


def read(path: str | Path) -> tuple[list[dict], str]:
    """(rows, provenance) of an operators' CSV. Raises ResultError, naming the line."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    notes = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    about = "; ".join(note for note in notes if note.startswith(ABOUT)) or " ".join(notes)
    body = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    rows = list(csv.DictReader(line for _, line in body))
    for (number, _), row in zip(body[1:], rows, strict=False):
        try:
            row["tokens"], row["us"] = int(row["tokens"]), float(row["us"])
            row["operator"] = str(row["operator"])
            row["floor_us"] = float(row.get("floor_us") or 0)
        except (KeyError, TypeError, ValueError):
            raise ResultError(f"{path}:{number}: needs the columns operator, tokens and us with numbers") from None
    if not rows:
        raise ResultError(f"{path}: holds no measurement")
    return rows, about


def operators(paths: Sequence[str | Path], directory: str | Path) -> list[Path]:
    """One call's latency against tokens, a panel a phase and number of adapters, and the paper's. Writes
    operators.{png,svg,csv} (panel, operator, tokens, us)."""
    tables = [read(path) for path in paths]
    rows = [row for table, _ in tables for row in table]
    shown = _narrowed(rows)
    by_panel: dict[str, dict[str, dict[int, float]]] = {}
    floors: dict[str, dict[int, float]] = {}
    for row in shown:
        about = [row.get("phase") or "", _plural(row["adapters"]) if row.get("adapters") else ""]
        panel = ", ".join(part for part in about if part) or "measured"
        by_panel.setdefault(panel, {}).setdefault(row["operator"], {})[row["tokens"]] = row["us"]
        if row["floor_us"]:
            floors.setdefault(panel, {})[row["tokens"]] = row["floor_us"]
    paper, _ = read(PAPER)
    about = "VaLoRA (EuroSys 2025), figure 17, A100-80GB, fp16"
    titles = [*by_panel, "Paper, A100: 1 adapter"]
    by_panel[titles[-1]] = {}
    for row in paper:
        by_panel[titles[-1]].setdefault(row["operator"], {})[row["tokens"]] = row["us"]
    place = places(dict.fromkeys(NAMES.get(name, name) for lines in by_panel.values() for name in lines))
    numbers = []
    columns = min(3, len(titles))
    count = -(-len(titles) // columns)
    with sheet(1.0 + 3.4 * columns, 0.8 + 2.9 * count, count, columns, sharey="row") as (figure, grid):
        for axes in grid.flat[len(titles) :]:
            axes.set_visible(False)
        for axes, title in zip(grid.flat, titles, strict=False):
            for name, values in by_panel[title].items():
                at = sorted(values)
                look = line(place[NAMES.get(name, name)]) | {"markersize": 3.5}
                axes.plot(at, [values[t] for t in at], label=name, **look)
                numbers += [(title, name, t, values[t]) for t in at]
            floor = sorted(floors.get(title, {}).items())
            axes.plot(*zip(*floor, strict=True) if floor else ([], []), color="#999999", linewidth=2.5, zorder=0,
                      label="floor: bytes or flops" if floor else None)  # fmt: skip
            numbers += [(title, "floor", t, us) for t, us in floor]
            axes.set(xscale="log", yscale="log", title=title, xlabel="Tokens")
            plain_log(axes.xaxis)
            plain_log(axes.yaxis)
            axes.grid(**GRID)
        for row in grid:
            row[0].set_ylabel("One call (us)")
        legend(figure, list(grid.flat), columns=5)
        setting = {key: shown[0][key] for key in FIXED if shown[0].get(key)}
        said = ", ".join(f"{key} {value}" for key, value in setting.items())
        footer(figure, f"{said}; {'; '.join(text for _, text in tables if text)[:400]}; paper: {about}")
        return save(figure, numbers, ("panel", "operator", "tokens", "us"), Path(directory) / "operators")


def _plural(adapters: str) -> str:
    return f"{adapters} adapter{'s' * (adapters != '1')}"


def _narrowed(rows: list[dict]) -> list[dict]:
    """The rows of one rank, width and skew, and of at most two numbers of adapters a phase."""
    for key, wanted in FIXED.items():
        values = {row[key] for row in rows if row.get(key)}
        if len(values) > 1:
            best = wanted if not isinstance(wanted, int) else min(values, key=lambda v: (abs(int(v) - wanted), v))
            rows = [row for row in rows if row.get(key) == str(best)]
    kept = set()
    for phase in dict.fromkeys(row.get("phase") for row in rows):
        measured: dict[int, set[str]] = {}  # number of adapters -> operators
        for row in rows:
            if row.get("phase") == phase and row.get("adapters"):
                measured.setdefault(int(row["adapters"]), set()).add(row["operator"])
        several = [n for n in measured if 1 < n <= 16] or list(measured)
        best = max(several, key=lambda n: (len(measured[n]), n), default=None)
        kept |= {(phase, str(n)) for n in (min(measured, default=None), best) if n is not None}
    return [row for row in rows if not row.get("adapters") or (row.get("phase"), row["adapters"]) in kept]

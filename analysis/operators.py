"""LoRA operators: the time of one call against its tokens (VaLoRA, figure 17), from the CSV files that measured them.

A file has the columns operator, tokens, us, and may have phase, adapters, rank, slices, skew, d_in, d_out, floor_us and
behind_us: what a call adds where it occurs, behind its linear layer. Where that is not 0 it is drawn, for some operators
work while the linear does. Lines that begin with # are the file's provenance.
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
SYSTEMS = {
    "valora": "atmm", "valora_atmm_fixed": "VaLoRA's release, repaired", "atmm-static": "atmm, one tiling", "vllm": "vLLM",
    "sgl": "SGLang", "punica": "Punica", "slora": "S-LoRA", "dlora": "dLoRA", "torch": "PyTorch", "grouped": "PyTorch",
    "loop": "PyTorch", "peft": "PEFT",
}  # fmt: skip
"""An operator's name, or what stands before its first _ -> whose it is. Of a system's operators the fastest at each point
is drawn."""
POLICIES = {"atmm": "valora", "dLoRA": "dlora", "S-LoRA": "slora", "Punica": "punica", "vLLM": "fcfs"}
"""Systems in the colour of the policy that uses their operator; the others in those that are left."""
FLOOR = "floor: bytes or flops"
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
            row["tokens"], row["us"] = int(row["tokens"]), float(row.get("behind_us") or 0) or float(row["us"])
            row["operator"] = str(row["operator"])
            row["floor_us"] = float(row.get("floor_us") or 0)
        except (KeyError, TypeError, ValueError):
            raise ResultError(f"{path}:{number}: needs the columns operator, tokens and us with numbers") from None
    if not rows:
        raise ResultError(f"{path}: holds no measurement")
    return rows, about


def operators(paths: Sequence[str | Path], directory: str | Path) -> list[Path]:
    """One call's latency against tokens, a panel a phase and number of adapters, and the paper's. Writes
    operators.{png,svg,csv} (panel, system, operator, tokens, us)."""
    tables = [read(path) for path in paths]
    shown = _narrowed([row for table, _ in tables for row in table])
    by_panel: dict[str, list[dict]] = {}
    for row in shown:
        about = [row.get("phase") or "", _plural(row["adapters"]) if row.get("adapters") else ""]
        by_panel.setdefault(", ".join(part for part in about if part) or "measured", []).append(row)
    by_panel["Paper, A100: 1 adapter"] = read(PAPER)[0]
    place = places(dict.fromkeys(POLICIES.get(_system(row), _system(row)) for rows in by_panel.values() for row in rows))
    numbers = []
    columns = min(3, len(by_panel))
    count = -(-len(by_panel) // columns)
    with sheet(1.0 + 3.0 * columns, 0.8 + 2.9 * count, count, columns) as (figure, grid):
        for axes, (title, rows) in zip(grid.flat, by_panel.items(), strict=False):
            numbers += _draw(axes, title, rows, place)
        for row in grid:
            row[0].set_ylabel("One call (us)")
        _explain(figure, grid, len(by_panel))
        setting = {key: shown[0][key] for key in FIXED if shown[0].get(key)}
        said = ", ".join(f"{key} {value}" for key, value in setting.items())
        about = "VaLoRA (EuroSys 2025), figure 17, A100-80GB, fp16"
        footer(figure, f"{said}; {'; '.join(dict.fromkeys(text for _, text in tables if text))[:600]}; paper: {about}")
        return save(figure, numbers, ("panel", "system", "operator", "tokens", "us"), Path(directory) / "operators")


def _system(row: dict) -> str:
    name = row["operator"]
    return SYSTEMS.get(name) or SYSTEMS.get(name.partition("_")[0], name)


def _draw(axes, title: str, rows: Sequence[dict], place: dict[str, int]) -> list[tuple]:
    """One panel: each system's fastest operator at each number of tokens, over the floor."""
    fastest: dict[str, dict[int, dict]] = {}
    floor: dict[int, float] = {}
    for row in rows:
        points = fastest.setdefault(_system(row), {})
        if row["tokens"] not in points or row["us"] < points[row["tokens"]]["us"]:
            points[row["tokens"]] = row
        if row["floor_us"]:
            floor[row["tokens"]] = row["floor_us"]
    numbers = []
    for system, points in fastest.items():
        at = sorted(points)
        look = line(place[POLICIES.get(system, system)]) | {"markersize": 3.5}
        axes.plot(at, [points[t]["us"] for t in at], label=system, **look)
        numbers += [(title, system, points[t]["operator"], t, points[t]["us"]) for t in at]
    if floor:
        axes.plot(*zip(*sorted(floor.items()), strict=True), color="#999999", linewidth=2.5, zorder=0, label=FLOOR)
        numbers += [(title, "", "floor", t, us) for t, us in sorted(floor.items())]
    axes.set(xscale="log", yscale="log", title=title, xlabel="Tokens")
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    axes.grid(**GRID)
    return numbers


def _explain(figure, grid, used: int) -> None:
    """The legend where a panel is left free, else above all."""
    free = list(grid.flat)[used:]
    for axes in free:
        axes.axis("off")
    if not free:
        legend(figure, list(grid.flat), columns=5)
        return
    found = {}
    for axes in grid.flat:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    free[0].legend(list(found.values()), list(found), loc="center", frameon=False, fontsize=9)


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

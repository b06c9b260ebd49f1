"""What the benchmark's rows say: wins and losses, distance to the floor, cost of skew, worth of adaptivity, the paper.

Operators are compared as their calls occur, behind a linear, where that was measured (`Row.cost_us`), and back to back
elsewhere: for an operator launched the ordinary way the two are alike. It reads result files only; it needs no GPU.
"""

from __future__ import annotations

from collections import defaultdict
from math import exp, log
from pathlib import Path

from kernels import results
from kernels.results import Row

OURS, STATIC = "atmm", "atmm-static"
PAPER_RATIOS = {"slora": 2.9, "punica": 2.3, "dlora": 3.4}
"""Summed latency over 1..8192 tokens, one adapter of rank 64, over ATMM's (VaLoRA, on an A100)."""
PEER_NAMES = {"slora": (), "punica": (), "dlora": ("gather_bmm",)}
"""Further names of a technique in the peers file."""
FLOOR_GOALS = {"decode": 4.5, "prefill": 1.6}
H = 4096


def geomean(values: list[float]) -> float:
    """Geometric mean; NaN of nothing."""
    return exp(sum(log(value) for value in values) / len(values)) if values else float("nan")


def by_point(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """{point: {operator: row}}, wrong results (error of 1e-2 and more, or NaN) left out."""
    points: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.error < 1e-2:
            points[row.point][row.operator] = row
    return points


def lines(rows: list[Row], peers: list[Row]) -> list[str]:
    """The verdict, a sentence a line."""
    points = by_point(rows)
    ours = {point: found[OURS] for point, found in points.items() if OURS in found}
    wrong = [row for row in rows if not row.error < 1e-2]
    out = [f"{len(rows)} rows at {len(points)} points; {len(wrong)} wrong by 1e-2 or more"]
    out += [f"  wrong: {row.operator} at {row.point}: {row.error:.1e}" for row in wrong[:5]]
    out += _floors(ours)
    out += _against("a rival measured here", ours, [r for r in rows if r.operator not in (OURS, STATIC)])
    out += _against("a peer's own operator (peers file)", ours, peers)
    out += _each(ours, rows)
    paper = [*_paper(ours, rows, "measured here"), *_paper(ours, peers, "peers file")]
    return [*out, *_skew(ours), *_static(points), *paper, *_named(ours)]


def _square(row: Row) -> bool:
    return row.d_in == H and row.d_out == H and row.slices == 1


def _of_paper(row: Row) -> bool:
    return _square(row) and (row.adapters, row.rank, row.skew) == (1, 64, "uniform")


def _floors(ours: dict) -> list[str]:
    out = []
    for phase, goal in FLOOR_GOALS.items():
        for slices in (1, 3):
            rows = [r for r in ours.values()
                    if r.phase == phase and r.slices == slices and r.d_in == H and r.skew == "uniform"]  # fmt: skip
            behind = [r.behind_us / r.floor_us for r in rows if r.behind_us and r.phase == "decode"]
            aim = f" (goal {goal})" if slices == 1 else ""
            for how, ratios in (("back to back", [r.us / r.floor_us for r in rows]), ("behind a linear", behind)):
                if ratios:
                    over = f"{geomean(ratios):.2f}x the floor {how} over {len(ratios)} points"
                    out.append(f"{phase}, {slices} slices: {over}{aim}")
    return out


def _against(whose: str, ours: dict, others: list[Row]) -> list[str]:
    """Wins and losses against the fastest other at each point, by part of the grid; every loss by name."""
    best: dict[tuple, Row] = {}
    for row in sorted(others, key=lambda row: -row.cost_us):
        if row.error < 1e-2 and row.point in ours:
            best[row.point] = row
    out = []
    parts: dict[tuple, list[tuple]] = defaultdict(list)
    for point, row in best.items():
        parts[row.phase, row.slices, row.skew].append((row.cost_us / ours[point].cost_us, point, row))
    for (phase, slices, skew), found in sorted(parts.items()):
        won = [gain for gain, *_ in found if gain >= 1]
        out.append(
            f"{phase}, {slices} slices, {skew}: no slower than {whose} at {len(won)} of {len(found)} points, "
            f"{geomean([gain for gain, *_ in found]):.2f}x the fastest's speed"
        )
        for gain, _, row in sorted(found, key=lambda f: f[0]):
            if gain < 1:
                out.append(
                    f"  lost: {row.tokens} tokens, {row.adapters} adapters, rank {row.rank}: {row.cost_us / gain:.2f} us, "
                    f"{row.operator} {row.cost_us:.2f}"
                )
    return out


def _each(ours: dict, rows: list[Row]) -> list[str]:
    """How much slower each rival is, geometric mean, by phase."""
    gains: dict[tuple, list[float]] = defaultdict(list)
    for row in rows:
        if row.operator not in (OURS, STATIC) and row.point in ours and row.error < 1e-2:
            gains[row.operator, row.phase].append(row.cost_us / ours[row.point].cost_us)
    return [
        f"{name}, {phase}: {geomean(ratios):.2f}x our time over {len(ratios)} points"
        for (name, phase), ratios in sorted(gains.items())
    ]


def _skew(ours: dict) -> list[str]:
    out = []
    for skew in ("skew60", "short"):
        for phase in ("decode", "prefill"):
            pairs = [(row, ours.get((*point[:-1], "uniform"))) for point, row in ours.items()
                     if row.skew == skew and row.phase == phase]  # fmt: skip
            alike = [(row, even) for row, even in pairs if even and bool(row.behind_us) == bool(even.behind_us)]
            ratios = [row.cost_us / even.cost_us for row, even in alike]
            if ratios:
                most = max(ratios)
                out.append(f"{skew}, {phase}: {geomean(ratios):.3f}x uniform, most {most:.2f}x, {len(ratios)} points")
    return out


def _static(points: dict) -> list[str]:
    """Our operator with its one best static tiling a phase, against the table, by part of the grid."""
    parts: dict[tuple, list[float]] = defaultdict(list)
    for found in points.values():
        if OURS in found and STATIC in found:
            row = found[OURS]
            width = "rank up to 32" if row.rank <= 32 else "rank from 64"
            few = "up to 16" if row.tokens <= 16 * row.adapters else "over 16"
            parts[row.phase, f"{few} rows an adapter", width].append(found[STATIC].cost_us / row.cost_us)
    return [
        f"adaptive tiling, {', '.join(part)}: {geomean(gains):.2f}x the one static tiling (most {max(gains):.2f}) "
        f"at {len(gains)} points"
        for part, gains in sorted(parts.items())
    ]


def _paper(ours: dict, others: list[Row], where: str) -> list[str]:
    """Summed latency over the paper's token counts, one adapter of rank 64, where the other was measured."""
    mine = {row.tokens: row.cost_us for row in ours.values() if _of_paper(row) and row.tokens <= 8192}
    out = []
    for name, goal in PAPER_RATIOS.items():
        theirs: dict[int, float] = {}
        for row in others:
            known = row.operator.removeprefix("torch_").startswith((name, *PEER_NAMES[name]))
            if known and _of_paper(row) and row.tokens in mine:
                theirs[row.tokens] = min(row.cost_us, theirs.get(row.tokens, row.cost_us))  # its better form
        if theirs:
            each = geomean([us / mine[tokens] for tokens, us in theirs.items()])
            total = sum(theirs.values()) / sum(mine[tokens] for tokens in theirs)
            out.append(f"{name} ({where}): {total:.2f}x our latency summed over {sorted(theirs)} tokens, one adapter, "
                       f"rank 64 (paper {goal}, over 1..8192); {each:.2f}x in the geometric mean")  # fmt: skip
    return out


def _named(ours: dict) -> list[str]:
    """The points that the project named before it measured."""
    out = []
    for tokens, adapters, phase, slices, goal in (
        (1, 1, "decode", 1, 4.0), (8, 8, "decode", 1, 4.0), (32, 8, "decode", 3, 11.0), (4096, 8, "prefill", 3, 100.0)
    ):  # fmt: skip
        row = ours.get((phase, H, slices * H, slices, tokens, adapters, 64, "uniform"))
        if row:
            out.append(f"{tokens} tokens, {adapters} adapters, {slices} slices, rank 64: {row.us:.2f} us back to back, "
                       f"{row.behind_us or row.us:.2f} as it occurs (goal {goal}, floor {row.floor_us:.2f})")  # fmt: skip
    return out


def report(path: Path, peers: Path = results.PEERS) -> str:
    """The verdict on a results file as text, with its provenance. LoraError if a file is no results file."""
    rows = results.read(path)
    about = [f"{key}: {value}" for key, value in results.header(path).items()]
    return "\n".join([*about, "", *lines(rows, results.read(peers) if peers.exists() else [])])

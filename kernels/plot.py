"""Draws a results file: time over the floor by tokens, ours and the rivals', one panel a rank. It measures nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from kernels import results
from kernels.verdict import OURS, STATIC, geomean

H = 4096
ADAPTERS = (1, 4, 8, 32)


def _shown(row: results.Row) -> bool:
    return row.d_in == row.d_out == H and row.adapters in ADAPTERS and row.skew == "uniform" and row.error < 1e-2


def draw(source: Path, out: Path, peers: Path = results.PEERS) -> None:
    """A figure of the square projection, equal shares: a line an operator, geometric mean over the adapter counts.

    Beside what was measured in one run, the fastest peer of the peers file at each point.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results.read(source) if _shown(r)]
    if peers.exists():
        best: dict[tuple, results.Row] = {}
        for row in filter(_shown, results.read(peers)):
            key = (row.rank, row.adapters, row.tokens)
            best[key] = min(best.get(key, row), row, key=lambda r: r.cost_us)
        rows += [replace(row, operator="best peer") for row in best.values()]
    ranks = sorted({row.rank for row in rows})
    figure, panels = pyplot.subplots(1, len(ranks), figsize=(3.2 * len(ranks), 3.4), sharey=True, squeeze=False)
    names = sorted({row.operator for row in rows}, key=lambda name: (name != OURS, name == STATIC, name))
    palette = pyplot.get_cmap("tab20").colors
    colours = dict(zip(names, palette[::2] + palette[1::2], strict=False))
    for panel, rank in zip(panels[0], ranks, strict=True):
        for name in names:
            mine = [r for r in rows if r.operator == name and r.rank == rank]
            counts = Counter(r.tokens for r in mine)
            tokens = sorted(t for t in counts if counts[t] > 1 or t == 1)  # one adapter alone is no mean over adapters
            over = [geomean([r.cost_us / r.floor_us for r in mine if r.tokens == t]) for t in tokens]
            style = {"linewidth": 2.4, "color": "black"} if name == OURS else {"linewidth": 1, "color": colours[name]}
            panel.plot(tokens, over, marker=".", label=name, linestyle="--" if name == STATIC else "-", **style)
        panel.set(title=f"rank {rank}", xlabel="tokens", xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("time over the floor")
    panels[0][-1].legend(fontsize=7)
    device = results.header(source).get("device", "")
    figure.suptitle(f"LoRA branch {H} -> {H}, geometric mean over adapter counts, {device}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)

"""Draws a results file: time over the floor by tokens, ours and the rivals', one panel a rank. It measures nothing."""

from __future__ import annotations

from pathlib import Path

from kernels import results
from kernels.verdict import OURS, STATIC, geomean

H = 4096


def draw(source: Path, out: Path) -> None:
    """A figure of the square projection, equal shares: a line an operator, geometric mean over the adapter counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in results.read(source) if r.d_in == H and r.d_out == H and r.skew == "uniform" and r.error < 1e-2]
    ranks = sorted({row.rank for row in rows})
    figure, panels = pyplot.subplots(1, len(ranks), figsize=(3.2 * len(ranks), 3.4), sharey=True, squeeze=False)
    names = sorted({row.operator for row in rows}, key=lambda name: (name != OURS, name == STATIC, name))
    colours = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    for panel, rank in zip(panels[0], ranks, strict=True):
        for name in names:
            tokens = sorted({r.tokens for r in rows if r.operator == name and r.rank == rank})
            mine = [r for r in rows if r.operator == name and r.rank == rank]
            over = [geomean([r.us / r.floor_us for r in mine if r.tokens == t]) for t in tokens]
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

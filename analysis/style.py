"""How all figures look, and how they are written: PNG and SVG, with the numbers that are drawn as CSV beside them.

Okabe and Ito's colours (safe for the colour-blind); lines differ in dashes and markers and bars in hatches, so that a
figure reads in greyscale too. Equal results give equal files. It knows nothing of what is drawn.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from traces.whole_file import replace_bytes

# Okabe & Ito, "Color Universal Design" (2008), without the yellow, faint on white; then two of P. Tol's muted ones, a brown.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933", "#7B4B2A")
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5, 1, 1.5, 1, 1.5)), (0, (10, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "---", "ooo")
ORDER = ("valora", "dlora", "slora", "punica", "fcfs", "merged-only", "base", "oracle")
"""Policies that every figure draws in the same colour; others take the colours left over."""
MODE_FILLS = {
    "base": ("#EEEEEE", "xxx"),
    "unmerged": ("#C8C8C8", "///"),
    "merged": ("#3A3A3A", ""),
    "mixture": ("#8C8C8C", "..."),
    "idle": ("#FFFFFF", ""),
}
"""Greys, so that a mode is not taken for a policy of the same colour."""
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "results",  # ids in the SVG do not change from run to run
    "svg.fonttype": "none",
}
KINDS = {
    "analytic": "analytic, not measured",
    "extrapolated": "extrapolated, not measured on this GPU",
    "measured": "measured",
}
"""What is said of a profile's kind."""
GRID = {"color": "#DDDDDD", "linewidth": 0.6}
UNTOLD = {".png": {"Software": None}, ".svg": {"Date": None}}
"""Kinds of image, and the metadata that each leaves out, so that equal figures are equal files."""
_IMAGES = ContextVar("images", default=tuple(UNTOLD))
"""The kinds that `save` writes."""


@contextmanager
def sheet(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> Iterator[tuple]:
    """(figure, array of axes of shape (rows, columns)) in the common style; sizes in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)


def places(labels: Iterable[str]) -> dict[str, int]:
    """label -> its place in PALETTE, DASHES, MARKERS and HATCHES: policies keep theirs, whoever else is drawn."""
    labels = list(labels)
    fixed = {label: ORDER.index(label.split("@")[0]) for label in labels if label.split("@")[0] in ORDER}
    if len(set(fixed.values())) < len(fixed):  # one policy several times: told apart by their order
        return {label: i for i, label in enumerate(labels)}
    free = (i for i in range(len(labels) + len(ORDER)) if i not in fixed.values())
    return {label: fixed[label] if label in fixed else next(free) for label in labels}


def line(place: int, *, marker: bool = True) -> dict:
    """Keywords of `Axes.plot` for the series at a place."""
    style = {"color": PALETTE[place % len(PALETTE)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.6}
    return style | ({"marker": MARKERS[place % len(MARKERS)], "markersize": 4.5} if marker else {})


def bar(place: int) -> dict:
    """Keywords of `Axes.bar` for the series at a place."""
    fill = {"color": PALETTE[place % len(PALETTE)], "hatch": HATCHES[place % len(HATCHES)]}
    return fill | {"edgecolor": "black", "linewidth": 0.8}


def legend(figure, axes, *, columns: int = 6) -> None:
    """One legend above the whole figure, from the handles of one or several axes."""
    found = {}
    for one in axes if isinstance(axes, Sequence) else [axes]:
        for handle, name in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        place = {"loc": "outside upper center", "ncols": min(len(found), columns), "frameon": False}
        figure.legend(list(found.values()), list(found), **place)


def footer(figure, text: str) -> None:
    """A grey line at the bottom that says where the numbers come from; broken where it is longer than the figure."""
    import textwrap

    width = int(figure.get_figwidth() * 17)
    lines = textwrap.wrap(text, width)
    inches = figure.get_figheight()
    figure.text(0.995, 0.02 / inches, "\n".join(lines), ha="right", va="bottom", fontsize=7, color="#555555")
    bottom = (0.06 + 0.13 * len(lines)) / inches
    figure.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))


def provenance(runs: Iterable[Mapping]) -> str:
    """Trace, model and profile of summaries' `run`, and whether the profile was measured."""
    facts = []
    for run in runs:
        kind = KINDS.get(run["profile_kind"], "of unknown kind")
        trace = Path(run["trace"] or "-").name
        facts.append(f"{trace}, {run['model'] or '-'}, profile {run['profile'] or '-'} ({kind})")
    return "; ".join(dict.fromkeys(facts))


def name_ticks(axes, names: Sequence[str], room: int = 38) -> None:
    """Names at 0, 1, 2 ... on the x axis, slanted where they are longer than `room` characters together."""
    crowded = sum(map(len, names)) > room
    axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")


def plain_log(axis) -> None:
    """A logarithmic axis with few plain numbers (0.1, 2, 5) instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    ratio = high / low if low > 0 else 10.0
    if ratio < 3:
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
    else:
        widest = 100 if axis.axis_name == "y" else 60  # labels side by side need more room
        subs = next((subs for most, subs in ((12, (1, 2, 3, 4, 5, 7)), (widest, (1, 2, 5))) if ratio < most), (1,))
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure, numbers: Iterable[tuple], header: tuple[str, ...], stem: Path) -> list[Path]:
    """Write PNG, SVG (but for `png_alone`) and CSV, each in one piece. Returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    _settle(figure)
    paths = []
    for suffix in _IMAGES.get():
        image = io.BytesIO()
        figure.savefig(image, format=suffix[1:], dpi=160, metadata=UNTOLD[suffix])
        content = _of_few_colours(image) if suffix == ".png" else image.getvalue()
        paths.append(replace_bytes(stem.with_suffix(suffix), content))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(header)
    rows.writerows(tuple(format(x, ".10g") if isinstance(x, float) else x for x in row) for row in numbers)
    paths.append(replace_bytes(stem.with_suffix(".csv"), text.getvalue().encode()))
    return paths


@contextmanager
def png_alone() -> Iterator[None]:
    """Figures saved within have no SVG, which takes as long to draw as the PNG."""
    token = _IMAGES.set((".png",))
    try:
        yield
    finally:
        _IMAGES.reset(token)


def _of_few_colours(image: io.BytesIO) -> bytes:
    """A PNG with a palette of its own: a figure has few colours, and needs a third of the bytes so."""
    from PIL import Image

    small = io.BytesIO()
    drawn = Image.open(image).convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    drawn.save(small, format="PNG", optimize=True)
    return small.getvalue()


def _settle(figure) -> None:
    """Lay the figure out once and round the places: the solver's last digits change from run to run, files must not."""
    figure.draw_without_rendering()
    places = [(axes, axes.get_position().bounds) for axes in figure.axes]
    figure.set_layout_engine("none")
    for axes, bounds in places:
        axes.set_position([round(value, 4) for value in bounds])

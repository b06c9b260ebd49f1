"""The report of a fusion as text and as a figure. It reads `report.json`'s content and computes nothing new of weight."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

COLOURS = {"classify": "#0072B2", "detect": "#D55E00", "vqa": "#009E73", "caption": "#CC79A7", "refer": "#E69F00",
           "video": "#56B4E9"}  # fmt: skip
"""Okabe and Ito's palette, told apart by the colour-blind; markers tell the tasks apart in grey."""
MARKERS = {"classify": "o", "detect": "s", "vqa": "^", "caption": "D", "refer": "v", "video": "P"}
TITLES = {"joint": "ours: jointly, the furthest below its floor first", "sequence": "the paper's: one after the other"}


def render(report: Mapping) -> str:
    """The tables: accuracy by domain on the held-out split, the packing beside the alternatives, the cost."""
    head = "".join(f"{title:>8}" for title in ("base", "own", "packed", "gain", "floor"))
    lines = [f"model {report['model']} on {report['device']}; accuracies on the held-out split", ""]
    lines.append(f"{'domain':<12}{'task':<10}{'metric':<10}{head}  holds  adapter")
    for name, row in report["domains"].items():
        figures = f"{row['base']:>8.3f}{_figure(row['own'])}{row['packed']:>8.3f}{row['packed'] - row['base']:>+8.3f}"
        figures += f"{row['floor']:>8.3f}  {'yes' if row['holds'] else 'NO':<5}  {row['adapter']}"
        lines.append(f"{name:<12}{row['task']:<10}{row['metric']:<10}{figures}")
    held = sum(row["holds"] for row in report["domains"].values())
    lines += [f"{held} of {len(report['domains'])} floors hold", ""]
    lines += [f"{'packing':<18}{'adapters':>9}{'attempts':>10}{'steps':>8}{'steps to the same':>19}  below a floor"]
    ours = report["packing"]
    wrong = len(report["domains"]) - held
    lines.append(_packing_line("ours", ours, ours["steps_to"], ours["adapters"], wrong))
    for name, other in report["compared"].items():
        missed = sum(score[0] < report["domains"][domain]["floor"] for domain, score in other["held_out"].items())
        lines.append(_packing_line(name, other, ours["steps_to"], other["adapters"], missed))
    lines += ["`steps to the same`: what ours had spent at the check that first showed a packing of as few adapters.", ""]
    for number, group in enumerate(ours["groups"]):
        lines.append(f"fused-{number}: {', '.join(group)}")
    if report["decoded"]:
        lines += ["", f"{'own adapter':<12}{'head':>8}{'decoded':>9}  tokens decoded without the head"]
    for name, row in report["decoded"].items():
        own = _figure(report["domains"][name]["own"])
        lines.append(f"{name:<12}{own}{row['accuracy']:>9.3f}  {row['answer_tokens']:.1f}")
    best = report["yardstick"]
    if best is not None:
        found = f"search {best['search']} adapters in {best['search_attempts']} attempts"
        optimum = f"optimum {best['optimum']} in {best['exhaustive_attempts']}"
        lines += ["", f"on {', '.join(best['domains'])}: {found}, {optimum}"]
    lines += ["", f"{'cost':<18}{'runs':>6}{'steps':>8}{'minutes':>9}"]
    lines += [f"{k:<18}{c['runs']:>6}{c['steps']:>8}{c['minutes']:>9.2f}" for k, c in report["cost"].items()]
    return "\n".join(lines) + "\n"


def summary(report: Mapping, command: str, seconds: float) -> dict:
    """The report without its single runs, and where it came from: what is kept as a measured result."""
    origin = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "command": f"python -m engine {command}",
        "seconds_of_the_last_call": round(seconds, 1),
    }  # fmt: skip
    return origin | {key: value for key, value in report.items() if key != "attempts"}


def _figure(value: float | None) -> str:
    return f"{value:>8.3f}" if value is not None else f"{'-':>8}"


def _packing_line(name: str, packing: Mapping, steps_to: Mapping[str, int], adapters: int, missed: int) -> str:
    known = [steps for size, steps in steps_to.items() if int(size) <= adapters]
    same = str(min(known)) if known else "-"
    return f"{name:<18}{packing['adapters']:>9}{packing['attempts']:>10}{packing['steps']:>8}{same:>19}  {missed}"


def curves(report: Mapping) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Kind of run -> task -> (domains fused, mean accuracy as a share of the own adapter's), on the decide split."""
    points: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for attempt in report["attempts"]:
        for name, accuracy in attempt["accuracies"].items():
            domain = report["domains"][name]
            if domain["own_decide"]:
                share = accuracy / domain["own_decide"]
                kinds = TITLES if attempt["kind"] == "own" else (attempt["kind"],)
                for kind in kinds:
                    points[kind][domain["task"]][len(attempt["accuracies"])].append(share)
    return {
        kind: {task: [(k, sum(v) / len(v)) for k, v in sorted(by.items())] for task, by in sorted(tasks.items())}
        for kind, tasks in sorted(points.items())
    }  # fmt: skip


def draw(report: Mapping, path: Path) -> None:
    """Accuracy against the number of domains fused, a panel a way of training, a line a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {kind: tasks for kind, tasks in curves(report).items() if any(len(line) > 1 for line in tasks.values())}
    drawn = {kind: tasks for kind, tasks in drawn.items() if kind in TITLES}
    figure, axes = plt.subplots(1, max(1, len(drawn)), figsize=(5.2 * max(1, len(drawn)), 3.8), sharex=True, sharey=True,
                                squeeze=False)  # fmt: skip
    for axis, (kind, tasks) in zip(axes[0], drawn.items(), strict=False):
        for task, line in tasks.items():
            axis.plot(*zip(*line, strict=True), color=COLOURS[task], marker=MARKERS[task], label=task, linewidth=1.6)
        axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(TITLES[kind], fontsize=10)
        axis.set_xlabel("domains fused into one adapter")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0][0].set_ylabel("accuracy, share of the own adapter's")
    if drawn:
        axes[0][-1].legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    unfinished = path.with_name(f".{path.name}.partial.png")
    figure.savefig(unfinished, dpi=150)
    plt.close(figure)
    os.replace(unfinished, path)

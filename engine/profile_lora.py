"""From rows of measurements to what operators' branches take: their tables, and what rows of one adapter do to them.

A branch is what a step takes longer than the same step without it, corrected for the GPU's clock where that is known. It
measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.profile_parts import FEW, Row
from policies.boost import factor_at
from policies.cost import Cost
from policies.plan import Work
from policies.profile import LORA_PHASES, Boost, Points, Profile
from traces.request import Adapter

PADDED = ("vllm", "dlora", "grouped")
"""Operators that compute every adapter of a batch at its largest rank."""
ANY = 999_999
"""Adapters up to which a mixture has one curve: it is timed with as many as there are."""
MANY, DEARER = 1024, 1.1
MOST_SKEW = 2.0
MOST_KNOWN = 32
"""Adapters up to which the operators were timed by themselves."""
ALONE = {"mixture_decode": "decode", "mixture_prefill": "prefill", "mixture_few": "decode"}
"""Tables of an operator by itself, in proportion to which a mixture's are of other ranks."""
PASS_ROWS = {"slora": 512}
"""Rows of one adapter that an operator's captured kernel computes side by side, before the next (`kernels.baselines`)."""


def work_of(values: list) -> Work:
    """A Work from a row."""
    return Work(*values[:3], tuple(map(tuple, values[3])), *values[4:])


def beside(us: float, hard: float, tokens: int, clock: Boost | None) -> float:
    """What a step of prompts takes beside its products of matrices, which by themselves, one behind another, take `hard` us.

    Beside something else that is less hard on the GPU the clock is higher, so they take less than that.
    """
    if clock and us > 0:
        rested, settled = (factor_at(points, tokens) for points in (clock.rested, clock.settled))
        hard *= (rested + (settled - rested) * min(1.0, hard / us)) / settled
    return max(us - hard, 0.0)


def branches(rows: Mapping[str, Row], linear: Mapping[int, float], clock: Boost | None) -> dict[str, dict]:
    """Operator -> phase -> rank -> adapters -> points: what a step takes longer than the same without its branch."""
    raw: dict[str, dict] = {}
    for key, row in rows.items():
        if row["what"] not in ("lora", "mixture", "few"):
            continue
        work = work_of(row["work"])
        operator, rank = (key.split()[1:3]) if row["what"] == "lora" else ("atmm", key.split()[1])
        kind = "prefill" if work.prefills else "decode"
        phase = {"lora": kind, "mixture": f"mixture_{kind}", "few": "mixture_few"}[row["what"]]
        size = work.decodes + work.prefill_tokens if phase == "mixture_few" else work.lora_tokens
        if work.prefills:
            branch = beside(row["us"], row["plain_us"], work.prefill_tokens, clock)
        else:
            branch = max(row["us"] - row.get("plain_us", linear[work.decodes]), 0.0)
        adapters = work.adapters if row["what"] == "lora" else ANY
        ranks = raw.setdefault(operator, {}).setdefault(phase, {}).setdefault(rank, {})
        ranks.setdefault(adapters, []).append([size, branch])
    for operator, phases in list(raw.items()):
        if not {"decode", "prefill"} <= phases.keys():
            del raw[operator]
            continue
        for ranks in phases.values():
            for rank, by_adapters in ranks.items():
                curves = {n: capped(sorted(points)) for n, points in sorted(by_adapters.items())}
                if operator in PASS_ROWS and 1 in curves:
                    curves[1] = stepped(curves[1], PASS_ROWS[operator])
                ranks[rank] = {str(n): points for n, points in curves.items()}
        phases["pads"] = operator in PADDED
    return raw


def stepped(points: Points, rows: int) -> Points:
    """Points of a kernel that goes over an adapter's rows in passes of so many: behind the first, level within each."""
    first = [point for point in points if point[0] <= rows]
    ends = {-(-int(x) // rows): y for x, y in points}  # passes -> the time of the longest that was measured with so many
    if not first or len(ends) < 2:
        return points
    counts = sorted(ends)
    found = [*first, [rows, ends[1]]] if first[-1][0] < rows else first
    for number in range(2, counts[-1] + 1):
        us = float(np.interp(number, counts, [ends[count] for count in counts]))
        found += [[(number - 1) * rows + 1, us], [number * rows, us]]
    return found


def skews(rows: Mapping[str, Row], profile: Profile, adapters: tuple[Adapter, ...]) -> dict[str, float]:
    """Operator -> how much of what `Cost` adds for the rows of one adapter it really takes, where that was measured."""
    found = {}
    for operator in profile.lora:
        cost, added, over = Cost(profile, operator, "fused", adapters), [], []
        for key, row in rows.items():
            if row["what"] == "skew" and key.split()[1] == operator:
                work = work_of(row["work"])
                even, whole = (cost.fixed(w)[3] / 1e6 for w in (work._replace(largest=0), work))
                added.append(whole - even)
                over.append(beside(row["us"], row["plain_us"], work.decodes + work.prefill_tokens, profile.boost) - even)
        if any(added):
            found[operator] = float(np.clip(np.dot(added, over) / np.dot(added, added), 0, MOST_SKEW))
    return found


def capped(points: Points) -> Points:
    """Points of a branch, in which a row costs at most DEARER more than at the size before, once there are MANY: what a step
    took longer than that is its clock's, which fell meanwhile."""
    found = points[:1]
    for x, y in points[1:]:
        before, us = found[-1]
        found.append([x, min(y, DEARER * us * x / before)] if before >= MANY else [x, y])
    return found


def other_ranks(lora: Mapping[str, dict], known: Profile, rank: int) -> dict[str, dict]:
    """The tables `lora`, with ranks that no engine was timed at as `known` has them in proportion to `rank`, which one was:
    its tables are of the operators by themselves."""
    found = {operator: dict(phases) for operator, phases in lora.items()}
    adapters = tuple(Adapter(f"a{i}", rank) for i in range(2))
    for operator, phases in found.items():
        if operator not in known.lora:
            continue
        cost = Cost(known, operator, "fused", adapters)
        for phase in [phase for phase in LORA_PHASES if str(rank) in phases.get(phase, {})]:
            alone, curves = ALONE.get(phase, phase), phases[phase][str(rank)]
            most = FEW if phase == "mixture_few" else ANY  # rows that have a branch
            phases[phase] = dict(phases[phase])
            for other in known.lora[operator][alone]:
                phases[phase].setdefault(str(other), {
                    number: [[x, us * _ratio(cost, min(x, most), int(number), other, rank, alone)] for x, us in points]
                    for number, points in curves.items()
                })  # fmt: skip
            phases[phase] = dict(sorted(phases[phase].items(), key=lambda item: int(item[0])))
    return found


def _ratio(cost: Cost, tokens: float, adapters: int, rank: int, over: int, phase: str) -> float:
    """What a branch of one rank takes over one of another."""
    count = min(adapters, MOST_KNOWN, max(1, int(tokens)))
    return cost.lora_ps(int(tokens), count, rank, phase) / max(1, cost.lora_ps(int(tokens), count, over, phase))

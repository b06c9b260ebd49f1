"""From rows of measurements to the tables of a profile: differences of whole steps, and a few small least-squares fits.

The tables add up to the steps that were measured: what is told apart (attention, LoRA) is the difference to a step without
it. Graphs pad a step to a bucket, so `linear` is a stair, written with a point at either end of each step. Chunks longer
than were measured over a context are filled in by the work of attention, chunk x (context + chunk / 2). It measures nothing
and knows no engine, only rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np

from engine.least_squares import non_negative, robust
from engine.profile_boost import Steady, Step, fit
from engine.profile_lora import beside, branches, other_ranks, skews, work_of
from engine.profile_parts import Row
from engine.stage import WARM_STEPS
from policies.cost import Cost
from policies.profile import LEASE_PARTS, Boost, Profile, ProfileError, parse_profile
from traces.request import Adapter

CLOCK_ROUNDS = 3
"""After which neither changes by more than a clock tells."""
QUADRATIC_AT = (1, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)

Points = list[list[float]]


class UnfinishedError(ValueError):
    """Rows that do not make a profile yet. The message names the parts that are missing."""


def tables(rows: Mapping[str, Row], facts: Mapping, clock: Boost | None = None) -> dict:
    """The profile as JSON-able data, without what the host costs. facts: the header of the rows. clock: what is known of the
    GPU's. Raises UnfinishedError."""
    by: dict[str, list[Row]] = {}
    for row in rows.values():
        by.setdefault(row["what"], []).append(row)
    needed = {"linear", "prefill", "attention", "vision", "load"} | ({"switch"} if facts["adapters"] > 1 else set())
    missing = sorted(needed - by.keys())
    if missing:
        raise UnfinishedError(f"no row yet of {', '.join(missing)}; run the same command again, it goes on where it stopped")
    alpha, beta = chunk_attention(rows)
    none = lambda tokens: alpha * tokens * tokens + beta  # noqa: E731
    linear = {row["requests"]: row["us"] for row in by["linear"]}
    prefill = {row["work"][4]: row["us"] for row in by["prefill"]}
    after = {tokens: max(us - none(tokens), 0.0) for tokens, us in prefill.items()}
    stairs = bool(facts["stairs"])
    decode = decode_attention(by["attention"], by["linear"])
    data = {
        "linear": steps_of(linear, stairs),
        "prefill_linear": steps_of(after, stairs),
        "decode_attention": decode,
        "prefill_attention": prefill_attention(by.get("extend", []), prefill, none, stairs),
        "mixed_attention": mixed_attention(by.get("mixed", []), steps_of(after, stairs), none, decode, clock),
        "vision": sorted([row["images"], row["us"]] for row in by["vision"]),
        "output": [[1, 0.0]],
        "lora": branches(rows, linear, clock),
        "switch": switches(by.get("switch", []), facts),
        **loads(by["load"]),
        "scatter": {what: scatter_of(found) for what, found in sorted(behind(by).items()) if found},
    }
    return rounded(data)


def behind(by: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Rows behind each table, for its scatter."""
    return {
        "linear": by["linear"], "prefill_linear": by["prefill"], "decode_attention": by["attention"],
        "prefill_attention": by.get("extend", []), "vision": by["vision"], "switch": by.get("switch", []),
        "lora": by.get("lora", []), "load": by["load"],
    }  # fmt: skip


def scatter_of(rows: Iterable[Row]) -> list[float]:
    """The 10th and 90th percentile of repeats over their median; the median over the rows."""
    return [round(median(row[name] / row["us"] for row in rows if row["us"]), 5) for name in ("p10", "p90")]


def steps_of(us: Mapping[int, float], stairs: bool) -> Points:
    """Points of a table measured at sizes; stairs: each holds back to behind the size before it."""
    points, before = [], 0
    for size, value in sorted(us.items()):
        if stairs and before + 1 < size:
            points.append([before + 1, value])
        points.append([size, value])
        before = size
    return points


def chunk_attention(rows: Mapping[str, Row]) -> tuple[float, float]:
    """(alpha, beta): a chunk of t tokens without context costs alpha t^2 + beta us, from equal tokens in one or many."""
    left, right = [], []
    whole = {row["work"][4]: row["us"] for row in rows.values() if row["what"] == "prefill"}
    for row in rows.values():
        chunks = row["work"][3] if row["what"] == "pieces" else []
        tokens = sum(t for t, _ in chunks)
        if len(chunks) > 1 and tokens in whole:
            left.append([sum(t * t for t, _ in chunks) - tokens * tokens, len(chunks) - 1])
            right.append(row["us"] - whole[tokens])
    return tuple(non_negative(left, right)) if left else (0.0, 0.0)


def decode_attention(rows: list[Row], linear: list[Row]) -> dict[str, Points]:
    """By batch, over the mean context: what a step takes longer than with hardly any.

    From a few hundred tokens on it grows in proportion to the keys that it reads; a step that scattered tells less of them.
    """
    near = {row["requests"]: row for row in linear}
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row["requests"] in near:
            found.setdefault(row["requests"], []).append(row)
    if not found:
        raise UnfinishedError("no batch has both a step with and one without context; measure --parts linear,attention")
    table = {}
    for batch, several in sorted(found.items()):
        base = near[batch]
        keys = [row["context"] - base["context"] for row in several]
        told = [1 / max(row["p90"] - row["p10"], 1e-3 * row["us"]) for row in several]
        once, each = non_negative([[w, w * k] for k, w in zip(keys, told, strict=True)],
                                  [w * (row["us"] - base["us"]) for row, w in zip(several, told, strict=True)])  # fmt: skip
        table[str(batch)] = [[base["context"], 0.0], *([base["context"] + k, once + each * k] for k in sorted(keys))]
    return table


def rising(points: Points) -> Points:
    """Points in order, none below the one before it."""
    best, found = 0.0, []
    for x, y in sorted(points):
        best = max(best, y)
        found.append([x, best])
    return found


def prefill_attention(rows: list[Row], prefill: Mapping[int, float], none, stairs: bool) -> dict[str, Points]:
    """By the context before a chunk, over its tokens."""
    whole = steps_of(prefill, stairs)
    known: dict[int, dict[int, float]] = {0: {}}
    for row in rows:
        (tokens, context), = row["work"][3]
        known.setdefault(context, {})[tokens] = row["us"] - at(whole, tokens) + none(tokens)
    sizes = sorted({t for points in known.values() for t in points} | {1, max(prefill)})
    table = {"0": rising([[t, none(t)] for t in QUADRATIC_AT if t <= max(prefill) or t == 1])}
    for context in sorted(known.keys() - {0}):
        points = known[context]
        first, last = min(points), max(points)
        filled = dict(points)
        for tokens in sizes:
            if tokens > last:
                filled[tokens] = points[last] * tokens * (context + tokens / 2) / (last * (context + last / 2))
            elif tokens < first:
                filled[tokens] = points[first] * tokens / first
        table[str(context)] = rising([[t, max(us, none(t))] for t, us in filled.items()])
    return table


def at(points: Points, x: float) -> float:
    """A table's value, linear between its points."""
    xs, ys = zip(*points, strict=True)
    return float(np.interp(x, xs, ys))


def mixed_attention(rows: list[Row], linear: Points, none, decode: Mapping[str, Points], clock: Boost | None
                    ) -> dict[str, Points]:  # fmt: skip
    """As `decode_attention`, in steps that have a chunk as well. Contexts that memory did not hold are filled in from it."""
    table: dict[int, Points] = {}
    for row in rows:
        chunks = row["work"][3]
        tokens = row["requests"] + sum(t for t, _ in chunks)
        hard = at(linear, tokens) + sum(none(t) for t, _ in chunks)
        table.setdefault(row["requests"], []).append([row["context"], beside(row["us"], hard, tokens, clock)])
    alone = sorted((int(batch), points) for batch, points in decode.items())
    for batch, points in table.items():
        last, us = max(points)
        likely = next((points for most, points in alone if most >= batch), alone[-1][1])
        points += [[context, us + at(likely, context) - at(likely, last)] for context, _ in likely if context > last]
    return {str(batch): rising(points) for batch, points in sorted(table.items())}


def switches(rows: list[Row], facts: Mapping) -> dict[str, Points]:
    """What the engine's one-launch switch takes, by rank: in, out and over to another, the mean. Other ways: as measured by
    themselves (facts["switches"])."""
    by_rank: dict[int, list[float]] = {}
    for row in rows:
        by_rank.setdefault(row["rank"], []).append(row["us"])
    fused = [[rank, sum(us) / len(us)] for rank, us in sorted(by_rank.items())]
    return {"fused": fused or [[1, 0.0]], **facts.get("switches", {})}


def loads(rows: list[Row]) -> dict:
    """Bandwidth and latency of a load; by how much it slows steps down."""
    sizes = sorted((row["bytes"], row["us"]) for row in rows)
    latency = 0.0
    (small, short), (large, long) = sizes[0], sizes[-1]
    if large > small and long > short:
        latency = max(0.0, short - small * (long - short) / (large - small))
    speed = large / 1e3 / max(1e-3, long - latency)  # bytes per us are MB/s
    return {"load_gb_per_s": speed, "load_latency_us": latency, "load_slowdown": median(row["slowdown"] for row in rows)}


def rounded(value):
    """Three decimals of a microsecond are more than a clock tells."""
    if isinstance(value, float):
        return round(value, 5 if abs(value) < 10 else 3)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


# -- what the host costs, and how good the tables are --------------------------------------------------------------------
def host(rows: Mapping[str, Row], *, hidden: bool) -> dict:
    """lease_us, decide_us and the hidden part of a step. hidden: the GPU runs while the host prepares the next step."""
    before, after, decide = [], [], {}
    for row in rows.values():
        if row["what"] != "host":
            continue
        decide[row["policy"]] = row["decide"]["us"]
        for lease in row["leases"]:
            work = work_of(lease["work"])
            if not lease["known"]:
                continue
            before.append(([1, lease["idle"]], lease["gap_us"]))
            if not work.images and not work.switch_rank:  # else the GPU has something to do meanwhile
                prompts = len(work.prefills)
                parts = [1, lease["loads"], work.decodes, prompts > 0, prompts]
                after.append((parts, lease["host_us"] - row["decide"]["us"]))
    found = dict.fromkeys(LEASE_PARTS, 0.0)
    for names, samples in (("base", "wake"), before), (("launch", "load", "request", "prompts", "chunk"), after):
        if samples:
            found |= dict(zip(names, robust(*map(list, zip(*samples, strict=True))), strict=True))
    data = {"lease_us": found, "decide_us": decide}
    if hidden:
        steps = [(row["requests"], row["host_us"]) for row in rows.values() if row["what"] == "linear"]
        base, request = non_negative([[1, n] for n, _ in steps], [us for _, us in steps])
        data |= {"host_step_us": base, "host_request_us": request}
    return rounded(data)


def clock_of(rows: Mapping[str, Row], profile: Profile, adapters: tuple[Adapter, ...]) -> Boost | None:
    """What the replays that timed the host tell of the GPU's clock under load, if they have enough to tell."""
    replays = []
    for row in rows.values():
        if row["what"] != "host" or row["operator"] not in profile.lora:
            continue
        cost = Cost(profile, row["operator"], "fused", adapters)
        replay = []
        for lease in row["leases"]:
            work = work_of(lease["work"])
            if work.prefills:
                hard, rest = cost.forward_ps(work)
                began = lease["start_us"] + lease["host_us"] + lease["vision_us"]
                replay.append(Step(began, lease["forward_us"], work.decodes + work.prefill_tokens, hard / 1e6, rest / 1e6,
                                   lease["vision_us"], cost.fixed(work)[2] / 1e6,
                                   not (lease["loads"] or lease["loading"])))  # fmt: skip
        replays.append(replay)
    found = fit(replays, [Steady(row["work"][4], row["us"], WARM_STEPS + row["times"]) for row in rows.values()
                          if row["what"] in ("prefill", "pieces")])  # fmt: skip
    return found and found[0]


def checked(rows: Mapping[str, Row], profile: Profile, adapters: tuple[Adapter, ...]) -> list[tuple[str, float, float]]:
    """(key, measured us, predicted us) of the steps that no table holds."""
    cost = cost_of(profile, adapters)
    found = []
    for key, row in rows.items():
        if row["what"] == "check":
            work = work_of(row["work"])
            work = work._replace(context_tokens=round(row["context"] * work.decodes))
            found.append((key, row["us"], cost.step_ps(work) / 1e6))
    return found


def cost_of(profile: Profile, adapters: tuple[Adapter, ...]) -> Cost:
    """Costs with the operator that the profile's engine ran all its parts with."""
    return Cost(profile, "atmm" if "atmm" in profile.lora else "none", "fused", adapters)


def profile_of(rows: Mapping[str, Row], facts: Mapping, provenance: dict, path: Path, known: Profile | None = None
               ) -> tuple[dict, list]:  # fmt: skip
    """(the whole profile as data, the held-out steps). path: what it will be called. known: tables of the operators by
    themselves, for ranks that the rows lack. Raises UnfinishedError."""
    names = ("model", "max_context", "image_tokens", "video_images", "kv_bytes_per_token", "adapter_bytes_per_rank",
             "weights_bytes", "golden_bytes", "device_bytes", "reserve_bytes", "steps_ahead", "rank_align")  # fmt: skip
    data = {"kind": "measured", "provenance": provenance, **{name: facts[name] for name in names}}
    data |= tables(rows, facts) | {"host_step_us": 0.0, "host_request_us": 0.0}
    adapters = tuple(Adapter(f"a{i}", facts["rank"]) for i in range(facts["adapters"]))
    parse = lambda: parse_profile(path, json.dumps(data).encode())  # noqa: E731
    try:
        data |= host(rows, hidden=bool(facts["steps_ahead"]))
        for _ in range(CLOCK_ROUNDS if facts["steps_ahead"] else 0):  # tables tell of the clock, and the clock of tables
            clock = clock_of(rows, parse(), adapters)
            if clock:
                data |= tables(rows, facts, clock) | {"boost": asdict(clock)}
        for operator, share in skews(rows, parse(), adapters).items():
            data["lora"][operator]["skew"] = rounded(share)
        if known is not None:
            data["lora"] = rounded(other_ranks(data["lora"], known, facts["rank"]))
        steps = checked(rows, parse(), adapters)
        if steps:
            ratios = [measured / predicted for _, measured, predicted in steps]
            data["scatter"]["model"] = [round(float(x), 5) for x in np.percentile(ratios, (10, 90))]
        parse()
    except ProfileError as error:
        raise UnfinishedError(f"the rows do not make a profile yet: {error}") from None
    return data, steps

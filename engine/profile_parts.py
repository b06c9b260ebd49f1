"""What a profile measures, part by part: each measurement is one row, named by a key, and one entry of a list of jobs.

Rows hold microseconds (median, 10th and 90th percentile of the repeats) and their conditions. Steps are timed as the replay
runs them (`stage`); what a table needs alone, attention say, is a difference of steps and made later (`profile_fit`). It
knows nothing of files and of the time that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from engine.graphs import BRANCHED, MIXED, PLAIN
from engine.stage import MODES, SceneError, Stage, spread
from engine.vision import BUCKETS as IMAGE_BUCKETS
from policies.plan import Plan

PARTS = ("linear", "prefill", "attention", "vision", "switch", "load", "host", "lora", "ranks", "check")
"""`lora` times the operators at the first rank, `ranks` at the others."""
NEAR = 16
"""Tokens of context that count as none: attention is what a step takes longer than with so many."""
LIVED = 600
"""Tokens of context of decodes whose branch is timed: as replays have them, for it may run beside their attention."""
MIX = 256
"""Rows of the steps with prompts whose decodes' attention is told apart."""

SKEWED = ((16, 240), (48, 208), (16, 1008), (48, 976))
"""(requests that decode, of all adapters in turn; rows of a prompt of one of them): steps as replays have them."""
FEW = 16
"""Requests that decode in a mixture step with few branches; half of them ask for others than the folded adapter."""
STEADY = 256
"""Rows up to which a step waits for memory and leaves the GPU's clock where it is."""

Row = dict
Job = tuple[str, Callable[[Stage], Row | None]]
"""(key, what measures it)."""


@dataclass(frozen=True)
class Grid:
    """Points to measure. decodes, tokens: buckets of graphs, or sizes where there are none. batches, contexts, chunks: of
    attention. adapters: in a batch. images: encoded together."""

    decodes: tuple[int, ...]
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    adapters: tuple[int, ...]
    images: tuple[int, ...]
    stairs: bool

    @classmethod
    def of(cls, stage: Stage, *, quick: bool) -> Grid:
        """What suits an engine's limits and graphs. quick: fewer points."""
        limits, runner = stage.config.limits, stage.runner
        batch, tokens = limits.max_batch, limits.max_batch_tokens
        stairs = runner.graphs is not None
        decodes = tuple(runner.graphs.buckets) if stairs else _upto((1, 2, 4, 8, 16, 32, 64, 128), batch)
        rows = tuple(runner.packed_graphs.buckets) if stairs else _upto((16, 32, 64, 128, 256, 512, 1024, 2048), tokens)
        contexts = (512, 2048, 3500) if quick else (256, 512, 1024, 2048, 3000, 3900)
        contexts = tuple(c for c in contexts if c + 60 < limits.max_context) or (limits.max_context // 2,)
        batches = tuple(b for b in decodes if b in ((1, 8, 32, batch) if quick else (1, 4, 8, 16, 32, 48, batch)))
        chunks = tuple(t for t in ((64, 256, 1024, 2048) if quick else (16, 64, 256, 512, 1024, 2048)) if t <= tokens)
        images = (1, 2, 3, 4, 5, 6, 8, 9, 16)
        return cls(decodes, rows, batches, contexts, chunks or (tokens // 2,), (1, 4, 16), images, stairs)


def _upto(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)


def measured(stage: Stage, plan: Plan, what: str, **conditions) -> Row:
    """Time a plan; its row."""
    if plan.prefills:
        stage.rest()
    timing = stage.time(plan)
    work = timing.work
    row = {"what": what, **conditions, **spread(timing.steps), "host_us": spread(timing.host)["us"]}
    row |= {"context": timing.context, "work": [*work[:3], list(map(list, work.prefills)), *work[4:]]}
    if timing.gpu:
        row["gpu_us"] = spread(timing.gpu)["us"]
    return row


# -- scenes -----------------------------------------------------------------------------------------------------------------
def decode_scene(stage: Stage, what: str, batch: int, context: int, adapters: int = 0, mode: str = "plain", merged: int = -1,
                 cold: int = 0) -> Row:  # fmt: skip
    """A step of `batch` decodes. adapters: how many they ask for, in turn; cold (mixture): of them, not the folded one."""
    stage.clear()
    asked = _asked(batch, adapters, mode, merged, cold)
    stage.load(sorted({a for a in asked if a >= 0} | ({merged} if merged >= 0 else set())))
    number = MODES[mode]
    decodes = stage.decoding([context] * batch, asked, number, merged)
    return measured(stage, Plan(number, merged, decodes=decodes), what, requests=batch, adapters=adapters, mode=mode)


def branched_scene(stage: Stage, what: str, batch: int, adapters: int, mode: str, merged: int = -1, cold: int = 0) -> Row:
    """`decode_scene` with a branch, behind the same step without. plain_us: of that."""
    context = min(LIVED, stage.config.limits.max_context // 2)
    plain = decode_scene(stage, what, batch, context)["us"]
    return decode_scene(stage, what, batch, context, adapters, mode, merged, cold) | {"plain_us": plain}


def _asked(count: int, adapters: int, mode: str, merged: int, cold: int) -> list[int]:
    if mode == "mixture":  # the cold ones first; they ask for adapters behind the folded one
        return [1 + i % max(1, adapters) for i in range(cold)] + [merged] * (count - cold)
    if mode == "merged":
        return [merged] * count
    return [i % adapters if adapters else -1 for i in range(count)]


def prefill_scene(stage: Stage, what: str, sizes: list[tuple[int, int]], decodes: tuple[int, int] = (0, 0),
                  adapters: int = 0, mode: str = "plain", merged: int = -1, *, folded: bool = False) -> Row:  # fmt: skip
    """A step of chunks (tokens, context) beside (requests, context) decodes, over `adapters` adapters in turn. In mixture
    mode half of the requests ask for others than the folded one, and the chunks unless they are `folded`."""
    stage.clear()
    number = MODES[mode]
    cold = len(sizes) if mode == "mixture" and not folded else 0
    asked = _asked(len(sizes), adapters, mode, merged, cold)
    others = _asked(decodes[0], adapters, mode, merged, decodes[0] // 2)
    stage.load(sorted({a for a in (*asked, *others) if a >= 0} | ({merged} if merged >= 0 else set())))
    seated = stage.decoding([decodes[1]] * decodes[0], others, number, merged)
    chunks = tuple(stage.chunk(*size, adapter, number, merged) for size, adapter in zip(sizes, asked, strict=True))
    plan = Plan(number, merged, chunks, seated)
    return measured(stage, plan, what, chunks=len(sizes), requests=decodes[0], adapters=adapters, mode=mode)


def branch_scene(stage: Stage, what: str, sizes: list[tuple[int, int]], adapters: int, mode: str, merged: int = -1,
                 decodes: tuple[int, int] = (0, 0), *, folded: bool = False) -> Row:  # fmt: skip
    """`prefill_scene` with a branch, behind the same step without, and for many rows before another. plain_us: their mean.
    Under a load of prompts the GPU's clock drifts by more than the branch costs; within a second it hardly does."""
    plain = [prefill_scene(stage, what, sizes, decodes)["us"]]
    row = prefill_scene(stage, what, sizes, decodes, adapters, mode, merged, folded=folded)
    if sum(tokens for tokens, _ in sizes) > STEADY:
        plain.append(prefill_scene(stage, what, sizes, decodes)["us"])
    return row | {"plain_us": sum(plain) / len(plain)}


def vision_scene(stage: Stage, images: int) -> Row | None:
    """Encoding `images` images of as many requests as they take."""
    shape, times = stage.runner.model.shape, []
    most = max(1, (min(stage.config.limits.max_context, stage.config.limits.max_batch_tokens) - 2) // shape.image_tokens)
    for _ in range(6 if stage.cuda else 3):
        stage.clear()
        left, chunks = images, []
        while left:
            count = min(left, most)
            chunks.append((stage.admit(count * shape.image_tokens + 1, -1, count, 1), 1))
            left -= count
        if len(chunks) > stage.config.limits.max_batch:
            return None
        times.append(stage.begin_only(Plan(MODES["plain"], -1, tuple(chunks)), "vision"))
    return {"what": "vision", "images": images, **spread(times[1:])}


def switch_scene(stage: Stage, way: str, rank: int) -> Row:
    """Fold in, restore, or change from one adapter to another."""
    stage.clear()
    stage.load([0, 1])
    first, second = (stage.decoding([NEAR], [adapter])[0] for adapter in (0, 1))
    merged = {0: Plan(MODES["merged"], 0, decodes=(first,)), 1: Plan(MODES["merged"], 1, decodes=(second,))}
    plain = Plan(MODES["unmerged"], decodes=(first, second))
    before, after = {"fold": (plain, merged[0]), "restore": (merged[0], plain), "change": (merged[0], merged[1])}[way]
    times = []
    for _ in range(8 if stage.cuda else 3):
        stage.begin_only(before, "switch")
        times.append(stage.begin_only(after, "switch"))
    return {"what": "switch", "way": way, "rank": rank, **spread(times[1:])}


def load_scene(stage: Stage, rank: int) -> Row:
    """A load, from several one behind another, and what they do to decode steps beside them. bytes: of one adapter.
    slowdown: of the steps that ran while the loads did."""
    runner, times, slower = stage.runner, [], []
    stage.clear()
    several = list(range(len(runner.loader.adapters)))[-8:]
    first, others = several[0], several[1:]
    stage.load(several)
    batch = min(16, stage.config.limits.max_batch)
    plan = Plan(MODES["unmerged"], decodes=stage.decoding([NEAR] * batch, [first] * batch))
    quiet = spread(stage.time(plan, 10).steps)["us"]
    for beside in (False, True) * 4:
        for adapter in others:
            runner.lora.evict(adapter)
        stage.synchronize()
        done: list[int] = []
        seen: list[int] = []
        began = stage.now_ns()
        for adapter in others:
            runner.loader.start(adapter)
        if beside:
            ends = stage.time(plan, 2, after=lambda seen=seen, done=done: seen.append(
                len(done.extend(runner.loader.ready()) or done))).ends_ns  # fmt: skip
            steps = np.diff(ends) / 1e3
            slower += [took / quiet - 1 for took, ready in zip(steps, seen[1:], strict=True) if ready < len(others)]
        runner.loader.drain()
        if not beside:
            times.append((stage.now_ns() - began) / 1e3 / len(others))
        for adapter in others:
            runner.lora.installed(adapter)
    slowdown = max(0.0, spread(slower)["us"]) if slower else 0.0
    size = runner.loader.adapters[first].nbytes
    return {"what": "load", "rank": rank, "bytes": size, "slowdown": round(slowdown, 4), **spread(times)}


# -- jobs -------------------------------------------------------------------------------------------------------------------
def linear_jobs(grid: Grid) -> Iterator[Job]:
    """Pure decodes without context: both ends of every stair follow from its bucket."""
    for batch in grid.decodes:
        yield f"linear {batch}", lambda stage, n=batch: decode_scene(stage, "linear", n, NEAR)


def prefill_jobs(grid: Grid) -> Iterator[Job]:
    """Steps with one chunk, by tokens; and the same tokens in several chunks, which tells attention apart."""
    for tokens in grid.tokens:
        yield f"prefill {tokens}", lambda stage, t=tokens: prefill_scene(stage, "prefill", [(t, 0)])
    for tokens in [t for t in grid.tokens if t >= grid.tokens[-1] // 2 and not t % 8][-2:]:
        for parts in (4, 8):
            sizes = [(tokens // parts, 0)] * parts
            yield f"prefill {tokens} in {parts}", lambda stage, s=sizes: prefill_scene(stage, "pieces", s)


def attention_jobs(grid: Grid) -> Iterator[Job]:
    """Decodes over contexts, chunks over contexts, and decodes beside a chunk."""
    for context in grid.contexts:
        for batch in grid.batches:
            yield f"attention {batch} {context}", lambda stage, n=batch, c=context: decode_scene(stage, "attention", n, c)
    for context in grid.contexts[1:] or grid.contexts:
        for tokens in grid.chunks:
            yield (f"extend {tokens} {context}",
                   lambda stage, t=tokens, c=context: _if_it_fits(stage, "extend", t, c))  # fmt: skip
    for batch in grid.batches:
        for context in (NEAR, *grid.contexts):
            yield f"mixed {batch} {context}", lambda stage, n=batch, c=context: _mixed(stage, n, c)


def _if_it_fits(stage: Stage, what: str, tokens: int, context: int) -> Row | None:
    if tokens + context >= stage.config.limits.max_context:
        return None
    return prefill_scene(stage, what, [(tokens, context)])


def _mixed(stage: Stage, batch: int, context: int) -> Row | None:
    rows = min(MIX, stage.config.limits.max_batch_tokens)
    if rows <= batch + 1 or batch + 1 > stage.config.limits.max_batch:
        batch = stage.config.limits.max_batch - 1  # the chunk takes a place in the batch
    return prefill_scene(stage, "mixed", [(rows - batch, 0)], (batch, context))


def vision_jobs(grid: Grid) -> Iterator[Job]:
    """Images; both ends of the stairs of the tower's graphs."""
    for images in sorted({*grid.images, *(b + 1 for b in IMAGE_BUCKETS), 2 * IMAGE_BUCKETS[-1]}):
        yield f"vision {images}", lambda stage, n=images: vision_scene(stage, n)


def switch_jobs(rank: int) -> Iterator[Job]:
    """In, out, and over to another."""
    for way in ("fold", "restore", "change"):
        yield f"switch {way} {rank}", lambda stage, way=way: switch_scene(stage, way, rank)


def load_jobs(rank: int) -> Iterator[Job]:
    """Alone and beside steps."""
    yield f"load {rank}", lambda stage: load_scene(stage, rank)


def lora_jobs(grid: Grid, operator: str, rank: int, adapters: int, *, mixture: bool, quick: bool) -> Iterator[Job]:
    """One operator's branch in decodes and chunks, by rows and adapters; the same steps without it are its reference."""
    decodes, tokens = lora_sizes(grid, quick=quick)
    for batch in ends_first(decodes):
        for several in [a for a in grid.adapters if a <= min(batch, adapters)]:
            yield (f"lora {operator} {rank} decode {batch} {several}",
                   lambda stage, n=batch, a=several: branched_scene(stage, "lora", n, a, "unmerged"))  # fmt: skip
    for rows in ends_first(tokens):
        for several in [a for a in grid.adapters if a * 4 <= rows and a <= adapters]:
            sizes = [(rows // several, 0)] * several
            yield (f"lora {operator} {rank} prefill {rows} {several}",
                   lambda stage, s=sizes, a=several: branch_scene(stage, "lora", s, a, "unmerged"))  # fmt: skip
    for requests, rows in SKEWED:
        if requests < decodes[-1] and requests + rows in tokens and adapters > 1:
            yield (f"skew {operator} {rank} {requests} {rows}",
                   lambda stage, n=requests, t=rows: branch_scene(stage, "skew", [(t, 0)], adapters, "unmerged",
                                                                  decodes=(n, NEAR)))  # fmt: skip
    others = adapters - 1
    if mixture and others > 0:
        for batch in [b for b in decodes if b > 1]:
            yield (f"mixture {rank} decode {batch}",
                   lambda stage, n=batch: branched_scene(stage, "mixture", n, others, "mixture", 0, n // 2))  # fmt: skip
        for rows in tokens[1:]:
            yield (f"mixture {rank} prefill {rows}",
                   lambda stage, r=rows: branch_scene(stage, "mixture", [(r, 0)], 1, "mixture", 0))  # fmt: skip
        few = min(FEW, decodes[-1] - 1)
        for rows in [rows for rows in tokens if few > 1 and rows >= 4 * few]:
            yield (f"few {rank} {rows}",
                   lambda stage, r=rows: branch_scene(stage, "few", [(r - few, 0)], others, "mixture", 0,
                                                      decodes=(few, NEAR), folded=True))  # fmt: skip


def lora_sizes(grid: Grid, *, quick: bool) -> tuple[list[int], list[int]]:
    """(requests, tokens) at which operators are timed, of the buckets there are."""
    decodes = [n for n in grid.decodes if n in (1, 2, 4, 8, 16, 32) or n == grid.decodes[-1]]
    wanted = (16, 64, 256, 512, 576, 1024, 2048) if quick else (16, 32, 64, 128, 256, 512, 576, 1024, 1536, 2048)
    return decodes, [n for n in grid.tokens if n in wanted or n == grid.tokens[-1]]


def ends_first(sizes: Sequence[int]) -> list[int]:
    """The largest, the smallest, and what lies between: a table that is cut short has its ends."""
    return [*dict.fromkeys([sizes[-1], sizes[0], *sizes])]


def check_jobs(grid: Grid, adapters: int) -> Iterator[Job]:
    """Steps of shapes that no table holds, against which the finished profile is held."""
    batch, rows, context = grid.decodes[-1], grid.tokens[-1], grid.contexts[-1]
    few, some = min(4, adapters), max(2, batch // 5)
    for n, c, mode, a in ((some, context // 3, "plain", 0), (some, context // 2, "unmerged", few),
                          (max(2, batch * 5 // 8), context // 4, "unmerged", adapters), (3, context * 2 // 3, "plain", 0)):
        yield (f"check {mode} {n} {c}",
               lambda stage, n=n, c=c, mode=mode, a=a: decode_scene(stage, "check", n, c, min(a, n), mode))  # fmt: skip
    for t, c, n, mode, a in ((rows * 5 // 16, 0, some, "plain", 0), (rows * 3 // 5, context // 5, some, "unmerged", few),
                             (rows // 3, context // 3, 0, "unmerged", 1), (rows * 3 // 4, 0, 0, "plain", 0),
                             (rows // 10, context // 2, batch // 2, "unmerged", adapters),
                             (rows * 3 // 5, 0, batch * 3 // 4, "plain", 0)):  # as in bursts: long prompts, many decodes
        yield (f"check {mode} {t} {c} {n}",
               lambda stage, t=t, c=c, n=n, mode=mode, a=a: prefill_scene(
                   stage, "check", [(t // 2, c), (t - t // 2, 0)], (n, context // 3), a, mode))  # fmt: skip


def attempt(job: Job, stage: Stage) -> Row | None:
    """The row of a job with its key; None where the engine cannot set the scene, or its memory not hold it."""
    key, measure = job
    row = None
    with suppress(SceneError):
        try:
            row = measure(stage)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            stage.renew()
    stage.clear()
    return None if row is None else {"key": key, **row}


def capture(stage: Stage, sizes: tuple[list[int], list[int]], *, everything: bool) -> None:
    """Capture the graphs that the scenes need; a step without one is launched kernel by kernel. sizes: of decodes and of
    tokens at which operators are timed, with their branch and without. everything: all sizes, but for mixtures."""
    runner = stage.runner
    if runner.graphs is None:
        return
    for graphs, wanted in zip((runner.packed_graphs, runner.graphs), reversed(sizes), strict=True):
        if not everything:
            graphs.buckets = [size for size in graphs.buckets if size in wanted]
        graphs.capture((PLAIN, BRANCHED))
        if everything:
            graphs.capture((MIXED,), wanted)
    if everything:
        runner.vision.capture()

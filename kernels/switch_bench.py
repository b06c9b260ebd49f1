"""Time the swift switch on this GPU beside the usual ways to merge, and measure the drift of the in-place form.

    python -m kernels.switch_bench --out switch.csv            # LLaVA-1.5-7B's q, k, v, o; ranks 16 to 256
    python -m kernels.switch_bench --models qwen2-vl-7b        # narrow k and v (GQA)
    python -m kernels.switch_bench --sweep --ranks 64          # every tile for some ranks, to choose merge.TILES again

A row is one way to switch; ms is the median over runs timed by CUDA events; GB/s counts the bytes that a switch must
move at least (each touched matrix read and written once, the factors read once), so that all ways compare. The copy row
is that floor as this GPU reaches it: a plain copy of the same matrices. Weights and factors are random, so it knows
nothing of what a real adapter does to a model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from kernels.measured import provenance, whole_file
from kernels.merge import FORMS, NO_SLOT, Factors, Tile, WeightSwitch, shared_bytes, switch_kernel

MODELS = {  # layers, then (d_out, d_in) of q, k, v, o in each
    "llava-7b": (32, ((4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096))),
    "llava-13b": (40, ((5120, 5120), (5120, 5120), (5120, 5120), (5120, 5120))),
    "qwen2-vl-7b": (28, ((3584, 3584), (512, 3584), (512, 3584), (3584, 3584))),
}
COLUMNS = ("form", "model", "rank", "layers", "ms", "ms_min", "gb_per_s", "moved_bytes", "error", "launches",
           "switches", "changed_share", "mean_drift", "max_drift")
SWEEP_SHAPES = (  # rows, columns, warps
    (64, 32, 4), (64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 256, 8),
)
SWEEP_WIDTHS = (1024, 4096)  # columns that one program walks


class World(NamedTuple):
    """Random weights of one model, views of one buffer (so that one copy and one batched matmul can be rivals)."""

    model: str
    rank: int  # of the first adapter
    weights: list[torch.Tensor]
    golden: list[torch.Tensor]
    flat: torch.Tensor  # what the weights are views of
    golden_flat: torch.Tensor
    adapters: list[list[Factors]]


def make_world(model: str, ranks: Sequence[int], seed: int = 0) -> World:
    """Weights of standard deviation 0.02, an adapter a rank with a delta of a tenth of that; bf16, on the GPU."""
    layers, widths = MODELS[model]
    shapes = list(widths) * layers
    g = torch.Generator("cuda").manual_seed(seed)
    offsets = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
    golden_flat = torch.empty(offsets[-1], dtype=torch.bfloat16, device="cuda").normal_(0, 0.02, generator=g)
    flat = golden_flat.clone()

    def views(buffer):
        return [buffer[lo:hi].view(shape) for lo, hi, shape in zip(offsets, offsets[1:], shapes, strict=False)]

    def factor(rank, width):
        return torch.empty((rank, width), dtype=torch.bfloat16, device="cuda").normal_(generator=g)

    pairs = [
        [Factors(factor(rank, d_in), factor(rank, d_out), 0.002 / math.sqrt(rank)) for d_out, d_in in shapes]
        for rank in ranks
    ]
    return World(model, ranks[0], views(flat), views(golden_flat), flat, golden_flat, pairs)


def gpu_ms(call: Callable[[], None], repeats: int, back: Callable[[], None] | None = None) -> list[float]:
    """GPU times of `call` over `repeats` runs after two warm-up runs; `back`, untimed, undoes each."""
    events = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        events.append((start, stop))
        if back is not None:
            back()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events[2:]]


def relative_error(world: World, truth: Callable[[int], torch.Tensor], every: int = 1) -> float:
    """Relative error of the weights (of one matrix in `every`) against `truth(entry)`, in float32."""
    off = norm = 0.0
    for entry in range(0, len(world.weights), every):
        weight = world.weights[entry]
        want = truth(entry)
        off += float((weight.float() - want).square().sum())
        norm += float(want.square().sum())
    return math.sqrt(off / norm)


def merged_truth(world: World, slot: int) -> Callable[[int], torch.Tensor]:
    """The float32 weights with adapter `slot` folded in."""

    def truth(entry):
        golden = world.golden[entry].float()
        if slot == NO_SLOT:
            return golden
        a, b, scale = world.adapters[slot][entry]
        return torch.addmm(golden, b.float().T, a.float(), alpha=scale)

    return truth


def fresh_switch(world: World, form: str) -> WeightSwitch:
    """The plain weights again, and every adapter registered."""
    world.flat.copy_(world.golden_flat)
    golden = world.golden if form == "golden" else None
    switch = WeightSwitch(world.weights, golden=golden, slots=len(world.adapters), form=form)
    for slot, factors in enumerate(world.adapters):
        switch.register(slot, factors)
    return switch


def switch_rows(world: World, repeats: int) -> Iterator[dict]:
    """Our forms: merge, restore and change, from the golden copy and in place."""
    for form in FORMS:
        switch = fresh_switch(world, form)
        for name, before, after in (("merge", NO_SLOT, 0), ("restore", 0, NO_SLOT), ("change", 0, 1)):
            switch.to(before)
            spans = gpu_ms(lambda s=switch, a=after: s.to(a), repeats, back=lambda s=switch, b=before: s.to(b))
            switch.to(after)
            error = relative_error(world, merged_truth(world, after))
            yield row(f"{name}_{form}", world, **timed(spans), moved_bytes=switch.moved_bytes(after, before),
                      error=f"{error:.2e}", launches=len(switch.passes(after, before)))


def rival_rows(world: World, repeats: int) -> Iterator[dict]:
    """The usual ways: a copy (the floor), addmm a matrix, from golden or in place, one baddbmm, PEFT's expression."""
    weights, golden, factors = world.weights, world.golden, world.adapters[0]
    moved = sum(2 * w.nbytes + f.a.nbytes + f.b.nbytes for w, f in zip(weights, factors, strict=True))
    scale = factors[0].scale
    b_columns = [f.b.T.contiguous() for f in factors]  # [d_out, rank], as PEFT keeps it
    truth = merged_truth(world, 0)

    def reset():
        world.flat.copy_(world.golden_flat)

    def addmm_golden():
        for w, g, f in zip(weights, golden, factors, strict=True):
            torch.addmm(g, f.b.T, f.a, alpha=f.scale, out=w)

    def addmm_in_place():
        for w, f in zip(weights, factors, strict=True):
            w.addmm_(f.b.T, f.a, alpha=f.scale)

    def peft_expression():
        for w, f, b in zip(weights, factors, b_columns, strict=True):
            w.add_((b @ f.a) * f.scale)

    ways = {"copy": (reset, 1), "addmm_golden": (addmm_golden, len(weights)),
            "addmm_in_place": (addmm_in_place, len(weights)), "peft_merge": (peft_expression, 3 * len(weights))}
    if len({w.shape for w in weights}) == 1:
        stack = world.flat.view(len(weights), *weights[0].shape)
        all_b, all_a = torch.stack(b_columns), torch.stack([f.a for f in factors])
        ways["baddbmm_in_place"] = (lambda: stack.baddbmm_(all_b, all_a, alpha=scale), 1)
    for name, (call, launches) in ways.items():
        reset()
        call()
        plain = name == "copy"
        error = relative_error(world, merged_truth(world, NO_SLOT) if plain else truth)
        yield row(name, world, **timed(gpu_ms(call, repeats)), moved_bytes=2 * world.flat.nbytes if plain else moved,
                  error=f"{error:.2e}", launches=launches)


def row(form: str, world: World, **values: float) -> dict:
    """One line of the result; columns that do not apply are empty."""
    if "ms" in values:
        values["gb_per_s"] = round(values["moved_bytes"] / values["ms"] / 1e6, 1)
    known = {"form": form, "model": world.model, "rank": world.rank, "layers": MODELS[world.model][0]}
    return {column: (known | values).get(column, "") for column in COLUMNS}


def timed(spans: list[float]) -> dict[str, float]:
    """ms and ms_min of GPU times in ms."""
    return {"ms": round(statistics.median(spans), 4), "ms_min": round(min(spans), 4)}


def drift_rows(model: str, ranks: Sequence[int], switches: int) -> Iterator[dict]:
    """What `switches` changes over adapters of these ranks leave of the weights, the last adapter taken out again.

    changed_share: elements that differ from the golden copy. mean_drift: mean |W - golden| over mean |golden|.
    max_drift: the largest |W - golden|.
    """
    world, adapters = make_world(model, ranks), len(ranks)
    for form in FORMS:
        switch = fresh_switch(world, form)
        for i in range(switches):
            switch.to(i % adapters)
        switch.to(NO_SLOT)
        changed = total = 0
        drift = size = most = 0.0
        for weight, golden in zip(world.weights, world.golden, strict=True):
            off = (weight.float() - golden.float()).abs()
            changed, total = changed + int((off > 0).sum()), total + off.numel()
            drift, size = drift + float(off.sum()), size + float(golden.float().abs().sum())
            most = max(most, float(off.max()))
        yield row(f"drift_{form}_{adapters}_adapters", world, switches=switches,
                  changed_share=round(changed / total, 4), mean_drift=f"{drift / size:.2e}", max_drift=f"{most:.2e}")


def sweep_tiles(rank: int, subtracts: bool) -> Iterator[Tile]:
    """Every tile of the sweep that fits in this GPU's shared memory at this padded rank."""
    limit_bytes = torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin
    for (rows, columns, warps), width in itertools.product(SWEEP_SHAPES, SWEEP_WIDTHS):
        for stages in (2, 3) if rank * (1 + subtracts) >= 128 else (3, 4):
            tile = Tile(rows, columns, width // columns, stages, warps)
            if shared_bytes(tile, rank, subtracts, itemsize=2) <= limit_bytes:
                yield tile


def sweep_rows(model: str, ranks: Sequence[int], repeats: int) -> Iterator[dict]:
    """Every tile for a merge from the golden copy and for a change in place. All are compiled first, on all cores."""
    world = make_world(model, [rank for rank in ranks for _ in range(2)])
    runs = []
    for form in FORMS:
        switch = fresh_switch(world, form)
        for i, rank in enumerate(ranks):
            plus, minus = (2 * i, NO_SLOT) if form == "golden" else (2 * i + 1, 2 * i)
            runs += [(switch, rank, plus, minus, tile) for tile in sweep_tiles(rank, minus != NO_SLOT)]
    with ThreadPoolExecutor() as executor, triton.AsyncCompileMode(executor, ignore_errors=True):
        for switch, _, plus, minus, tile in runs:
            grid, args, options = switch.arguments(plus, minus, tile)
            switch_kernel.warmup(*args, grid=grid, **options)
    for switch, rank, plus, minus, tile in runs:
        change = "merge_golden" if minus == NO_SLOT else "change_in_place"
        name = f"{change} tile {'x'.join(map(str, tile))}"
        try:
            spans = gpu_ms(lambda s=switch, p=plus, m=minus, t=tile: s.launch(p, m, t), repeats)
        except triton.runtime.errors.OutOfResources as full:
            print(f"{name}: {full}", file=sys.stderr)
            continue
        error = f"{relative_error(world, merged_truth(world, plus), every=16):.2e}" if minus == NO_SLOT else ""
        moved = switch.moved_bytes(plus, minus)
        yield row(name, world, rank=rank, **timed(spans), moved_bytes=moved, error=error, launches=1)


def main(argv: list[str]) -> int:
    """Run the benchmark; CSV to stdout and to --out, progress to stderr. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.switch_bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", choices=MODELS, nargs="+", default=["llava-7b"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128, 256], metavar="RANK")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--drift", type=int, default=1000, metavar="SWITCHES", help="0 leaves the drift out")
    parser.add_argument("--sweep", action="store_true", help="time every tile for these ranks, nothing else")
    parser.add_argument("--out", type=Path, help="CSV file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("switch_bench times a GPU and CUDA sees none here; run it on a machine that has one", file=sys.stderr)
        return 1
    origin = provenance(f"python -m kernels.switch_bench {' '.join(argv)}".rstrip())
    lines = [*(f"# {key}: {value}" for key, value in origin.items()), ",".join(COLUMNS)]
    print("\n".join(lines))
    for values in all_rows(args):
        lines.append(",".join(map(str, values.values())))
        print(lines[-1], flush=True)
    if args.out:
        with whole_file(args.out) as file:
            file.write("\n".join(lines) + "\n")
    return 0


def all_rows(args: argparse.Namespace) -> Iterator[dict]:
    """The rows that the arguments ask for, in order; one world of weights on the GPU at a time."""
    for model in args.models:
        if args.sweep:
            yield from sweep_rows(model, args.ranks, args.repeats)
            continue
        for rank in args.ranks:
            world = make_world(model, [rank, rank])
            yield from switch_rows(world, args.repeats)
            yield from rival_rows(world, args.repeats)
            del world
        if args.drift:
            yield from drift_rows(model, [64] * 8, args.drift)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Times the engine's steps on this GPU: `python -m engine.step_bench --out FILE` writes one JSON record with provenance.

Decode steps by CUDA graph for each kind of branch beside the floor of the bytes that they must read, prefills, the vision
tower, and an adapter's load while decoding. Contexts are made up (random keys), lengths real. Microseconds of the GPU by
events; the median of the repeats. It measures the engine as `replay` runs it, not the parts by themselves.

Tokens are drawn at random, each request's its own: no real prompt has rows that are all alike, and arithmetic on them may
draw less power, so that a GPU at its limit of power would keep a higher clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from engine.build import Engine, build, find_adapters
from engine.cache import PageTable
from engine.decoder import Decoder
from engine.graphs import BRANCHED, KINDS, MIXED, PLAIN
from engine.models import Model, random_model
from engine.options import TARGETS
from engine.peft_baseline import peft_step_us
from engine.replay import EngineConfig
from engine.sequence import Decodes
from engine.sequence import Sequence as Served
from engine.serve import describe_device, describe_model
from kernels import timing
from policies import make_policy
from policies.plan import BASE, MIXTURE, UNMERGED, Plan
from policies.view import Limits
from traces.assign import make_adapters
from traces.request import Request
from traces.whole_file import replace_text

READ_TB_S = 4.5
"""What an H200 reads (measured); the floor of a step is its weights and keys at this rate."""
SPARE_PAGES = 256
"""Beside those of the sequences; what the memory holds beyond is left to others, as to processes that compile."""
MODES = {PLAIN: BASE, BRANCHED: UNMERGED, MIXED: MIXTURE}


def events_us(run: Callable[[], None], times: int) -> float:
    """Median microseconds of `times` runs on the GPU."""
    return median(timing.events_us(run, times))


def weights_bytes(model: Model) -> int:
    """Bytes of decoder and LM head, which every step reads."""
    language = sum(parameter.nbytes for parameter in model.hf.model.language_model.layers.parameters())
    return language + model.hf.lm_head.weight.nbytes


class Bench:
    """An engine with all adapters resident and made-up sequences."""

    def __init__(self, model: Model, args: argparse.Namespace):
        self.model = model
        adapters = make_adapters(args.adapters, args.ranks)
        most, longest = max(args.batches), max(args.prefills)
        config = EngineConfig(
            limits=Limits(most, max(longest, 2048), args.context + 512), targets=TARGETS[args.targets],
            pages=max(most * (args.context // 16 + 1), longest // 16 + most) + SPARE_PAGES,
        )  # fmt: skip
        found = find_adapters(adapters, model, config.targets, None, 0)
        self.engine: Engine = build(model, Decoder(model), adapters, found, make_policy("valora"), None, config)
        self.runner = self.engine.runner
        self.context, self.adapters = args.context, args.adapters
        self.runner.cache.keys.normal_()
        self.runner.cache.values.normal_()
        for adapter in range(args.adapters):
            self.runner.loader.start(adapter)
        self.runner.loader.drain()
        for adapter in range(args.adapters):
            self.runner.lora.installed(adapter)

    def served(self, number: int, kv: int, tokens: int, adapter: int) -> Served:
        """A sequence with `kv` tokens in the cache and `tokens` more to compute, the last of which a decode step takes."""
        request = Request(number, 0, kv + tokens, 1, adapter)
        sequence = Served(request, self.runner.made_up.prompt(request), self.model.shape, None)
        sequence.table, sequence.kv, sequence.row = PageTable([]), kv, number
        self.runner.cache.extend(sequence.table, kv + tokens)
        self.runner.last_tokens[number].fill_(int(sequence.prompt.ids[-1]))
        return sequence

    def release(self, sequences: Sequence[Served]) -> None:
        """Give their pages back."""
        for sequence in sequences:
            self.runner.cache.release(sequence.table)

    def decode_us(self, kind: int, batch: int, repeats: int) -> dict:
        """One decode step of `batch` requests with `context` tokens: the graph alone, and with the host's part."""
        graphs, mode = self.runner.graphs, MODES[kind]
        sequences = [self.served(i, self.context, 1, i % self.adapters) for i in range(batch)]
        merged = 0 if kind == MIXED else -1
        graphs.replay(mode, merged, Decodes(sequences, self.runner.cache, self.runner.width))
        captured = graphs._graphs[kind, graphs._bucket(batch)]
        torch.cuda.synchronize()
        for _ in range(3):
            captured.graph.replay()
        alone = events_us(captured.graph.replay, repeats)
        decodes = Decodes(sequences, self.runner.cache, self.runner.width)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            graphs.replay(mode, merged, decodes)
        host = (time.perf_counter() - began) / repeats * 1e6
        torch.cuda.synchronize()
        wall = (time.perf_counter() - began) / repeats * 1e6
        self.release(sequences)
        read = weights_bytes(self.model) + batch * self.context * self.model.shape.kv_bytes_per_token(self.model.dtype)
        floor = read / READ_TB_S / 1e6
        return {
            "what": "decode", "kind": KINDS[kind], "requests": batch, "context": self.context, "graph_us": round(alone, 1),
            "wall_us": round(wall, 1), "host_us": round(host, 1), "floor_us": round(floor, 1),
        }  # fmt: skip

    def prefill_us(self, tokens: int, adapters: int, repeats: int) -> dict:
        """One eager step with prompts of up to 1,024 tokens, `tokens` in all, over `adapters` adapters (0: none)."""
        runner, parts = self.runner, max(1, tokens // 1024)
        sequences = [self.served(i, 0, tokens // parts, i % adapters if adapters else -1) for i in range(parts)]
        runner._plan = Plan(UNMERGED if adapters else BASE)
        runner._decodes = Decodes([], runner.cache, runner.width)
        runner._chunks = [(sequence, tokens // parts) for sequence in sequences]

        def run() -> None:
            runner._compute()
            runner._flights.clear()

        for _ in range(3):
            run()
        took = events_us(run, repeats)
        runner._chunks = []
        self.release(sequences)
        layers = weights_bytes(self.model) - self.model.hf.lm_head.weight.nbytes
        linear = 2 * tokens * layers / self.model.dtype.itemsize / took / 1e6  # of the whole step's time
        return {
            "what": "prefill", "tokens": tokens, "prompts": parts, "adapters": adapters, "us": round(took, 1),
            "linear_tflop_s": round(linear, 1),
        }  # fmt: skip

    def vision_us(self, images: int, repeats: int) -> dict:
        """The vision tower over a batch of images."""
        pixels = torch.stack([self.runner.made_up.pixels(key) for key in range(images)])
        self.runner.vision.encode(pixels)
        took = events_us(lambda: self.runner.vision.encode(pixels), repeats)
        return {"what": "vision", "images": images, "us": round(took, 1)}

    def switch_us(self, repeats: int) -> dict:
        """Fold an adapter in, and restore."""
        lora = self.runner.lora
        for adapter in (0, -1):
            lora.fold(adapter)
        torch.cuda.synchronize()
        fold, restore = [], []
        for _ in range(repeats):
            fold.append(events_us(lambda: lora.fold(0), 1))
            restore.append(events_us(lambda: lora.fold(-1), 1))
        return {"what": "switch", "fold_us": round(median(fold), 1), "restore_us": round(median(restore), 1)}

    def load_us(self, batch: int, repeats: int) -> dict:
        """The load of one adapter beside decode steps of `batch` requests, and what it does to them."""
        runner = self.runner
        sequences = [self.served(i, self.context, 1, 0) for i in range(batch)]
        runner.graphs.replay(UNMERGED, -1, Decodes(sequences, runner.cache, runner.width))
        graph = runner.graphs._graphs[BRANCHED, runner.graphs._bucket(batch)].graph
        torch.cuda.synchronize()
        last = self.adapters - 1
        quiet, beside, loads = [], [], []
        stream = runner.loader._stream
        for _ in range(repeats):
            quiet.append(events_us(graph.replay, 4))
            runner.lora.evict(last)
            torch.cuda.synchronize()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            runner.loader.start(last)
            stop.record(stream)
            beside.append(events_us(graph.replay, 1))
            runner.loader.drain()
            loads.append(1e3 * start.elapsed_time(stop))
        self.release(sequences)
        size = runner.loader.adapters[last].nbytes
        took = median(loads)
        return {
            "what": "load", "requests": batch, "bytes": size, "us": round(took, 1), "gb_s": round(size / took / 1e3, 1),
            "step_alone_us": round(median(quiet), 1), "step_beside_us": round(median(beside), 1),
        }  # fmt: skip


def measure(model: Model, args: argparse.Namespace) -> list[dict]:
    """All rows; each is printed to stderr as it comes."""
    bench, rows = Bench(model, args), []

    def add(row: dict) -> None:
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    began = time.perf_counter()
    bench.runner.graphs.buckets = sorted(args.batches)
    bench.runner.graphs.capture((PLAIN, BRANCHED, MIXED) if args.adapters else (PLAIN,))
    add({"what": "capture", "graphs": len(bench.runner.graphs._graphs), "s": round(time.perf_counter() - began, 1)})
    for batch in args.batches:
        for kind in (PLAIN, BRANCHED, MIXED) if args.adapters else (PLAIN,):
            add(bench.decode_us(kind, batch, args.repeats))
    for tokens in args.prefills:
        for adapters in dict.fromkeys((0, min(args.adapters, max(1, tokens // 1024)))):
            add(bench.prefill_us(tokens, adapters, max(3, args.repeats // 4)))
    bench.runner.vision.capture()
    for images in (1, 4, 8):
        add(bench.vision_us(images, max(3, args.repeats // 4)))
    if args.adapters:
        add(bench.switch_us(max(3, args.repeats // 4)))
        add(bench.load_us(max(args.batches), max(3, args.repeats // 4)))
    if args.peft:
        shape = {"requests": min(32, max(args.batches)), "context": args.context, "adapters": args.adapters}
        del bench.runner, bench.engine  # its memory is wanted
        gc.collect()
        torch.cuda.empty_cache()
        took = peft_step_us(model, **shape, rank=max(args.ranks), repeats=5)
        add({"what": "transformers + PEFT decode", **shape, "us": round(took, 1)})
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    """What a Bench takes."""
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 64], help="requests of a decode step")
    parser.add_argument("--prefills", type=numbers, default=[1024, 4096, 8192], help="tokens of a step of prompts")
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--ranks", type=numbers, default=[64])
    parser.add_argument("--targets", choices=TARGETS, default="attention")
    parser.add_argument("--repeats", type=int, default=30)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m engine.step_bench", description="Time the engine's steps on this GPU.")
    options(parser)
    parser.add_argument("--out", metavar="FILE", help="JSON record (default: stdout)")
    parser.add_argument("--peft", action="store_true", help="a decode step of transformers and PEFT as well, at last")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU; these figures are of one")
    model = random_model(args.model, dtype=torch.bfloat16, device="cuda")
    record = {
        "what": "engine steps, microseconds", "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": describe_device(model.device), "model": describe_model(model),
        "command": "python -m engine.step_bench " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "rows": measure(model, args),
    }  # fmt: skip
    text = json.dumps(record, indent=1) + "\n"
    if not args.out:
        sys.stdout.write(text)
        return 0
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    replace_text(Path(args.out), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

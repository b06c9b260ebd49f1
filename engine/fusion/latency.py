"""What a vision task head saves: the same requests answered by the head and by decoding, one at a time, through the engine.

    python -m engine.fusion.latency --fused DIR            domains, base model and adapters that `fuse demo` left there
    python -m engine.fusion.latency --model llava-1.5-7b   random weights at full size, made-up video requests

Both ways serve the same prompts with the same adapter (ledger, policy, runner, on a GPU VaLoRA's operator in CUDA graphs);
a decoded answer has as many tokens as the right one. The latency is the mean of a request alone: vision tower, prefill,
decode. What the head costs or gains in accuracy stands in the report of `fuse`. VaLoRA (EuroSys 2025) saves 41-63 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from engine.build import Adapters, build, find_adapters
from engine.clock import WallClock
from engine.decoder import Decoder
from engine.fusion.domains import DomainError, load_domains
from engine.fusion.wording import Wording, boxes_text
from engine.fusion.workbench import open_workbench
from engine.images import load_image
from engine.models import MODELS, Model, load_model
from engine.options import TARGETS
from engine.prompts import MadeUp, Prompt
from engine.replay import Driver, EngineConfig
from engine.serve import describe_device, describe_model, frozen_heap, warm_up
from kernels.measured import asked
from policies import make_policy
from policies.plan import Work
from policies.view import Limits
from traces.options import count
from traces.request import Adapter, Trace
from traces.suggest import SuggestingParser
from traces.whole_file import replace_text

PAPER = (-63.0, -41.0)
VIDEO_TOKENS = 7
"""Tokens of a decoded answer about a video in the paper's artefact."""
QUESTION_TOKENS = 24
BATCH_TOKENS = 2048
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """Requests of one kind. adapter: of `found`. head_prompts: with the query positions of boxes. tokens: of the answers."""

    name: str
    adapter: Adapter
    found: Adapters
    prompts: list[Prompt]
    head_prompts: list[Prompt]
    tokens: list[int]


def compare(model: Model, cases: Sequence[Case]) -> list[dict]:
    """Of each case the mean milliseconds of a request, by the head and decoded, and what the head changes in per cent."""
    decoder, rows = Decoder(model), []
    for case in cases:
        length = float(np.mean([len(prompt.ids) for prompt in case.prompts]))
        head_ms, head_steps = _serve(model, decoder, case, case.head_prompts, [1] * len(case.prompts), head=True)
        decoded_ms, steps = _serve(model, decoder, case, case.prompts, case.tokens, head=False)
        rows.append({
            "case": case.name, "requests": len(case.prompts), "prompt_tokens": length,
            "answer_tokens": float(np.mean(case.tokens)), "head_steps": head_steps, "decoded_steps": steps,
            "head_ms": head_ms, "decoded_ms": decoded_ms, "change_percent": 100 * (head_ms / decoded_ms - 1),
        })  # fmt: skip
    return rows


class _Counting(WallClock):
    """steps: forward passes that have ended."""

    steps = 0

    def finish_step(self, work: Work, number: int) -> int:
        self.steps += 1
        return super().finish_step(work, number)


def _serve(model: Model, decoder: Decoder, case: Case, prompts: list[Prompt], tokens: list[int], *,
           head: bool) -> tuple[float, int]:
    """(milliseconds a request, steps in all): the median of ROUNDS rounds after one that compiles what there is."""
    n, lengths = len(prompts), np.array([len(prompt.ids) for prompt in prompts])
    most = int((lengths + tokens).max())
    trace = Trace.build(
        np.zeros(n, np.int64), lengths, np.array(tokens), images=np.array([len(prompt.images) for prompt in prompts]),
        adapters=(case.adapter,), adapter=np.zeros(n, np.int32), head=np.full(n, head), source=case.name,
    )  # fmt: skip
    config = EngineConfig(limits=Limits(1, BATCH_TOKENS, most), pages=2 * -(-most // EngineConfig.page_tokens) + 64,
                          prefix_cache=False, targets=TARGETS["attention"],
                          operator="atmm" if model.device.type == "cuda" else None)  # fmt: skip
    policy = make_policy("fcfs")
    engine = build(model, decoder, trace.adapters, case.found, policy, None, config)
    warm_up(engine, policy, trace, config, 0)
    rounds = []
    for _ in range(1 + ROUNDS):
        engine.renew(config, policy)
        engine.hold((case.adapter.name,))
        with frozen_heap():
            clock = _Counting(engine.runner)
            driver = Driver(trace, policy, engine.ledger, None, engine.journal, clock, engine.runner,
                            prompts=dict(enumerate(prompts)))  # fmt: skip
            driver.run()
        if driver.reasons:
            raise DomainError(f"{case.name}: the engine served not all requests: {next(iter(driver.reasons.values()))}")
        rounds.append(driver.last_ps / 1e9 / n)
    return median(rounds[1:]), clock.steps


# -- requests --------------------------------------------------------------------------------------------------------------
def cases_of(model: Model, wording: Wording, domains_yaml: Path, packing: dict[str, str], adapters: Path,
             requests: int) -> list[Case]:
    """The first held-out examples of each domain with a head, for the adapter that serves it."""
    cases = []
    for domain in load_domains(domains_yaml):
        if not domain.head or domain.name not in packing:
            continue
        told = json.loads((adapters / packing[domain.name] / "adapter_config.json").read_text(encoding="utf-8"))
        adapter = Adapter(packing[domain.name], told["r"])
        found = find_adapters((adapter,), model, TARGETS["attention"], adapters, 0)
        if found.heads == [None]:
            raise DomainError(f"{adapters}/{adapter.name}: {next(iter(found.reasons.values()), 'it has no task head')}")
        plain, queried, tokens = [], [], []
        for example in domain.examples["heldout"][:requests]:
            pixels = [load_image(path, model.shape).to(model.device, model.dtype) for path in example.images]
            plain.append(prompt_of(model, wording, pixels, wording.tail(example.question)))
            queried.append(prompt_of(model, wording, pixels, wording.tail(example.question, queries=domain.boxed)))
            side = float(model.shape.image_size)
            boxes = tuple(box._replace(x1=box.x1 / side, y1=box.y1 / side, x2=box.x2 / side, y2=box.y2 / side)
                          for box in example.boxes)  # fmt: skip
            text = boxes_text(boxes, named=True) if domain.boxed else example.answers[0]
            tokens.append(len(wording.answer(text)))
        cases.append(Case(domain.name, adapter, found, plain, queried, tokens))
    return cases


def prompt_of(model: Model, wording: Wording, pixels: list[torch.Tensor], tail: list[int]) -> Prompt:
    """Lead, images and `tail` as the engine takes them."""
    ids, starts = list(wording.lead), []
    for number in range(len(pixels)):
        ids += wording.between if number else []
        starts.append(len(ids))
        ids += [model.shape.image_token_id] * model.shape.image_tokens
    return Prompt(np.array([*ids, *tail], np.int32), tuple(starts), list(pixels))


def made_up(model: Model, requests: int, tokens: int, rank: int = 64) -> Case:
    """Video requests as the paper's: its number of images, a random adapter with a random head."""
    shape = model.shape
    adapter = Adapter("made-up", rank)
    found = find_adapters((adapter,), model, TARGETS["attention"], None, 0)
    images, length = shape.video_images, shape.video_images * shape.image_tokens + QUESTION_TOKENS
    trace = Trace.build(np.zeros(requests, np.int64), np.full(requests, length), np.full(requests, tokens),
                        images=np.full(requests, images))  # fmt: skip
    source = MadeUp(shape, 0, dtype=model.dtype, device=model.device)
    prompts = [source.prompt(request) for request in trace.requests()]
    return Case(f"{images} images, {tokens} tokens", adapter, found, prompts, prompts, [tokens] * requests)


# -- the command -----------------------------------------------------------------------------------------------------------
def render(report: dict) -> str:
    """The table."""
    lines = [f"{report['model']['name']} on {report['device']['name']}: milliseconds of a request served alone", "",
             f"{'case':<22}{'requests':>9}{'prompt':>8}{'answer':>8}{'head':>9}{'decoded':>9}{'change':>9}"]  # fmt: skip
    lines += [
        f"{row['case']:<22}{row['requests']:>9}{row['prompt_tokens']:>8.0f}{row['answer_tokens']:>8.1f}{row['head_ms']:>9.2f}"
        f"{row['decoded_ms']:>9.2f}{row['change_percent']:>+8.0f}%" for row in report["cases"]
    ]  # fmt: skip
    return "\n".join([*lines, f"the paper: {PAPER[0]:+.0f} to {PAPER[1]:+.0f} %"]) + "\n"


def run(args: argparse.Namespace) -> int:
    """Measure, write --out, print."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if (args.fused is None) == (args.model is None) or args.requests < 1 or args.tokens < 1:
        raise DomainError("give either --fused DIR or --model NAME, and at least one request and one token")
    if args.fused is not None:
        folder = Path(args.fused)
        yaml = folder / "data" / "domains.yaml"
        bench = open_workbench(folder / "base", load_domains(yaml), rank=8, alpha=8.0, dropout=0.0, device="cpu")
        model = load_model(str(folder / "base"), dtype=dtype, device=device, seed=0)
        packing = json.loads((folder / "packing.json").read_text(encoding="utf-8"))
        cases = cases_of(model, bench.wording, yaml, packing, folder / "adapters", args.requests)
    else:
        if args.model not in MODELS:
            raise DomainError(f"--model {args.model!r}: there are {', '.join(MODELS)}; or name a result with --fused")
        model = load_model(args.model, dtype=dtype, device=device, seed=0)
        cases = [made_up(model, args.requests, args.tokens)]
    tell(model, {"cases": compare(model, cases)}, render, args)
    return 0


def tell(model: Model, found: dict, table: Callable[[dict], str], args: argparse.Namespace) -> None:
    """Print what was found of a model, as `table` renders it; args.out: a file for the same as JSON, and what was asked."""
    report = {**args.told, "model": describe_model(model), "device": describe_device(model.device), **found}
    if args.out:
        replace_text(Path(args.out), json.dumps(report, indent=1) + "\n")
    sys.stdout.write(table(report))


def command(parser: SuggestingParser, run: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
    """Run what measures a model's requests, with --device and --out beside its own options; the exit code."""
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--out", metavar="FILE", help="also write the figures as JSON")
    args = parser.parse_args(argv)
    args.told = asked(" ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)]))
    try:
        return run(args)
    except (ValueError, OSError) as error:
        return parser.error(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = SuggestingParser("python -m engine.fusion.latency", description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--fused", metavar="DIR", help="output of `fuse demo`")
    add("--model", metavar="NAME", help=f"random weights of one of {', '.join(MODELS)}")
    add("--requests", type=count, default=32, metavar="N", help="of each domain (default 32)")
    add("--tokens", type=count, default=VIDEO_TOKENS, metavar="N", help=f"of a made-up answer (default {VIDEO_TOKENS})")
    return command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())

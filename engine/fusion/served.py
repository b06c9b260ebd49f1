"""Whether the engine answers as training did: held-out requests of all domains, mixed, through the engine with the adapters.

    python -m engine.fusion.served --fused DIR     base model, domains, adapters and packing.json of `fuse demo`

The requests of all domains are shuffled, served in one run by the chosen policy (batches of several adapters, heads beside
decoded answers, CUDA graphs where there are any), and judged by each domain's metric; beside it stand the same examples as
training evaluates them. It knows answers, not times; `engine.fusion.latency` has those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import load_peft_weights, set_peft_model_state_dict

from engine.build import build, find_adapters
from engine.clock import WallClock
from engine.decoder import Decoder
from engine.fusion.domains import Domain, DomainError, load_domains
from engine.fusion.evaluate import ROOM, answer_of, predict
from engine.fusion.latency import command, prompt_of, tell
from engine.fusion.merged import merge_heads
from engine.fusion.metrics import Box, score
from engine.fusion.task_heads import NAMES_FILE, Head, corners_of
from engine.fusion.workbench import Workbench, open_workbench
from engine.heads import Detection
from engine.images import load_image
from engine.models import Model, load_model
from engine.options import TARGETS
from engine.prompts import Prompt
from engine.replay import Driver, EngineConfig
from engine.runner import Answer
from engine.serve import warm_up
from policies import make_policy
from policies.view import Limits
from traces.options import count
from traces.request import Adapter, Trace
from traces.suggest import SuggestingParser

SEATS, STEP_TOKENS = 64, 8192
"""Requests in a batch, and tokens of a step."""
WITHOUT_COSTS = ("fcfs", "punica", "merged-only")
"""Policies that need no latency profile, which a model made here does not have."""
NEAR = 0.02
"""Corners that differ by less, of the image's side, are the same box."""


@dataclass(frozen=True)
class Asked:
    """One held-out example as a request: whose it is, its number there, the prompt, and the tokens of its answer."""

    domain: Domain
    number: int
    prompt: Prompt
    tokens: int


def check(model: Model, bench: Workbench, packing: dict[str, str], adapters: Path, policy: str, seed: int = 0) -> list[dict]:
    """Of each domain in `packing` the accuracy in training's own evaluation and in the engine's answers, and how many agree.

    bench: on the same base model and of the adapters' rank; its domains' held-out splits are what is asked.
    """
    domains = [domain for domain in bench.domains if domain.name in packing]
    heads, trained = {}, {}
    for name in sorted(set(packing.values())):
        heads[name] = _load(bench, adapters / name)
        for domain in (domain for domain in domains if packing[domain.name] == name):
            trained[domain.name] = predict(bench, bench.sample(domain.name, "heldout"), heads[name])
    asked = [one for domain in domains for one in _requests(model, bench, domain)]
    order = np.random.default_rng(seed).permutation(len(asked))
    asked = [asked[i] for i in order]
    answers = _served(model, asked, packing, adapters, policy)
    rows = []
    for domain in domains:
        sample = bench.sample(domain.name, "heldout")
        mine = sorted((one.number, answers[i]) for i, one in enumerate(asked) if one.domain is domain)
        said = [_said(bench, domain, heads[packing[domain.name]], answer) for _, answer in mine]
        wanted = sample.boxes if domain.boxed else sample.accepted
        same = [_same(a, b) for a, b in zip(said, trained[domain.name], strict=True)]
        in_training, in_engine = (score(domain.metric, found, wanted) for found in (trained[domain.name], said))
        rows.append({
            "domain": domain.name, "metric": domain.metric, "adapter": packing[domain.name], "requests": len(said),
            "trained": in_training.value, "served": in_engine.value, "served_stderr": in_engine.stderr,
            "same_answers": sum(same) / len(same),
        })  # fmt: skip
    return rows


def _load(bench: Workbench, folder: Path) -> Head | None:
    """Put the adapter in `folder` on the bench; its head, None where it has none."""
    set_peft_model_state_dict(bench.peft, load_peft_weights(str(folder), device="cpu"))
    if not (folder / NAMES_FILE).exists():
        return None
    told = json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))
    head = Head([bench.domain(name) for name in told["domains"]], bench.model.shape.hidden, 0)
    merge_heads(head, [folder])
    return head.to(bench.device)


def _requests(model: Model, bench: Workbench, domain: Domain) -> list[Asked]:
    longest = max(len(ids) for ids in bench.sample(domain.name, "heldout").answers)
    found = []
    for number, example in enumerate(domain.examples["heldout"]):
        pixels = [load_image(path, model.shape).to(model.device, model.dtype) for path in example.images]
        tail = bench.wording.tail(example.question, queries=domain.head and domain.boxed)
        prompt = prompt_of(model, bench.wording, pixels, tail)
        found.append(Asked(domain, number, prompt, 1 if domain.head else longest + ROOM))
    return found


def _served(model: Model, asked: Sequence[Asked], packing: dict[str, str], adapters: Path,
            policy_name: str) -> dict[int, Answer]:  # fmt: skip
    """The engine's answer to each request, by its number in `asked`. DomainError if one could not be served."""
    names = sorted(set(packing.values()))
    ranks = [json.loads((adapters / name / "adapter_config.json").read_text(encoding="utf-8"))["r"] for name in names]
    known = tuple(Adapter(name, rank) for name, rank in zip(names, ranks, strict=True))
    found = find_adapters(known, model, TARGETS["attention"], adapters, 0)
    if found.reasons:
        name, why = next(iter(found.reasons.items()))
        raise DomainError(f"{adapters / name}: {why}")
    lengths, tokens = (np.array(v) for v in ([len(one.prompt.ids) for one in asked], [one.tokens for one in asked]))
    most = int((lengths + tokens).max())
    trace = Trace.build(
        np.zeros(len(asked), np.int64), lengths, tokens, images=np.array([len(one.prompt.images) for one in asked]),
        adapters=known, adapter=np.array([names.index(packing[one.domain.name]) for one in asked], np.int32),
        head=np.array([one.domain.head for one in asked]), source="held-out examples",
    )  # fmt: skip
    pages = 2 * SEATS * -(-most // EngineConfig.page_tokens)
    config = EngineConfig(limits=Limits(SEATS, STEP_TOKENS, most), pages=pages, prefix_cache=False,
                          targets=TARGETS["attention"])  # fmt: skip
    policy = make_policy(policy_name)
    engine = build(model, Decoder(model), known, found, policy, None, config)
    warm_up(engine, policy, trace, config, 0)
    engine.renew(config, policy)
    driver = Driver(trace, policy, engine.ledger, engine.cost, engine.journal, WallClock(engine.runner), engine.runner,
                    prompts={i: one.prompt for i, one in enumerate(asked)})  # fmt: skip
    driver.run()
    if driver.reasons:
        raise DomainError(f"the engine served not all requests: {next(iter(driver.reasons.values()))}")
    return dict(engine.runner.answers)


def _said(bench: Workbench, domain: Domain, head: Head | None, answer: Answer) -> str | list[Box]:
    """What the engine answered, in the form that the metrics take."""
    if answer.head is None:
        return answer_of(domain, bench.wording.text(answer.tokens))
    if not isinstance(answer.head, Detection):
        return _label(domain, head.rows[answer.head])
    if not domain.boxed:
        return _label(domain, head.rows[int(answer.head.classes[-1])])
    told = zip(answer.head.classes.tolist(), corners_of(answer.head.boxes.float()).tolist(), answer.head.scores.tolist(),
               strict=True)  # fmt: skip
    found = [
        Box(_label(domain, head.rows[row]), *corners, chance) for row, corners, chance in told
        if head.rows[row].startswith(f"{domain.name}/")
    ]  # fmt: skip
    return sorted(found, key=lambda box: -box.score)


def _label(domain: Domain, row: str) -> str:
    return row.removeprefix(f"{domain.name}/")


def _same(a: str | list[Box], b: str | list[Box]) -> bool:
    """Equal texts; or as many boxes, of the same labels in some order, with corners less than NEAR apart."""
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    left, right = (sorted(found, key=lambda box: (box.label, box.x1, box.y1)) for found in (a, b))
    return len(left) == len(right) and all(
        x.label == y.label and max(abs(u - v) for u, v in zip(x[1:5], y[1:5], strict=True)) < NEAR
        for x, y in zip(left, right, strict=True)
    )


def render(report: dict) -> str:
    """The table."""
    told = f"{report['model']['name']} on {report['device']['name']}, policy {report['policy']}"
    lines = [f"{told}: the same held-out examples in training's evaluation and through the engine", ""]
    lines.append(f"{'domain':<12}{'metric':<10}{'adapter':<12}{'requests':>9}{'training':>10}{'engine':>8}{'same':>8}")
    lines += [
        f"{row['domain']:<12}{row['metric']:<10}{row['adapter']:<12}{row['requests']:>9}{row['trained']:>10.3f}"
        f"{row['served']:>8.3f}{row['same_answers']:>8.1%}" for row in report["domains"]
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> int:
    """Serve, judge, write --out, print."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(args.fused)
    packing = json.loads((folder / "packing.json").read_text(encoding="utf-8"))
    told = json.loads((folder / "adapters" / min(packing.values()) / "adapter_config.json").read_text(encoding="utf-8"))
    domains = tuple(
        replace(domain, examples=domain.examples | {"heldout": domain.examples["heldout"][: args.requests]})
        for domain in load_domains(folder / "data" / "domains.yaml")
    )
    bench = open_workbench(folder / "base", domains, rank=told["r"], alpha=told["lora_alpha"], dropout=0.0, device=device)
    model = load_model(str(folder / "base"), dtype=bench.model.dtype, device=device, seed=0)
    rows = check(model, bench, packing, folder / "adapters", args.policy)
    tell(model, {"policy": args.policy, "domains": rows}, render, args)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = SuggestingParser("python -m engine.fusion.served", description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--fused", metavar="DIR", required=True, help="output of `fuse demo`")
    add("--requests", type=count, default=256, metavar="N", help="held-out examples of each domain (default 256)")
    add("--policy", choices=WITHOUT_COSTS, default="fcfs", help="that serves them (default fcfs)")
    return command(parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())

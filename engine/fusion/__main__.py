"""`python -m engine fuse`: pack labelled domains into the fewest LoRA adapters that keep each above its accuracy floor.

    python -m engine fuse --model DIR --domains domains.yaml --output DIR
    python -m engine fuse demo --output DIR          everything made here, nothing downloaded

The table goes to stdout, progress to stderr. Exit codes: 0; 2 bad input; 3 a floor does not hold on the held-out split;
75 the time of --stop-after was up, run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.options import EXIT_TIME
from traces.options import count, not_negative
from traces.suggest import SuggestingParser
from traces.whole_file import replace_text

COMPARE = ("heuristic", "heuristic-early", "decoded")
SIZES = ("seconds", "small", "full")
EXIT_FLOOR = 3
DEFAULT_RETRIES, DEMO_RETRIES = 12, 2
"""Attempts on fewer adapters where there are more domains than can be proven."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fuse`."""
    add = parser.add_argument
    add("what", nargs="?", choices=("demo",), help="make data and base model first, instead of --model and --domains")
    add("--model", metavar="DIR", help="checkpoint directory of a LLaVA or Qwen2-VL model (safetensors)")
    add("--domains", metavar="FILE", help="YAML of the domains (engine/fusion/domains.py has its format)")
    add("--output", metavar="DIR", required=True, help="adapters, packing.json, report; a command cut off goes on from here")
    add("--size", choices=SIZES, default="full", help="of the demo (default full; small: minutes on a CPU)")
    add("--retries", metavar="N|all", default="auto",
        help=f"attempts on fewer adapters than packed first (default: all up to 6 domains, else {DEFAULT_RETRIES})")
    add("--compare", metavar="NAMES", default=None, help=f"also run, comma-separated: {', '.join(COMPARE)} (demo: all)")
    add("--rank", type=int, default=64, metavar="R", help="of the adapters (default 64; the demo has its own)")
    add("--steps", type=int, default=None, metavar="N", help="optimizer steps of one domain (default 300)")
    add("--batch", type=int, default=None, metavar="N", help="examples a step (default 32)")
    add("--learning-rate", type=float, default=None, metavar="LR", help="default 2e-4 (the demo has its own)")
    add("--seed", type=int, default=0)
    add("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    add("--workers", type=count, default=None, metavar="N",
        help="processes that train side by side (default: as many as the machine carries; results do not depend on it)")
    add("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that draw the demo's data")
    add("--no-graphs", action="store_true", help="train without CUDA graphs, should their capture end the process")
    add("--stop-after", type=not_negative, metavar="SECONDS", help="stop at the next checkpoint, to go on later")


def run(args: argparse.Namespace) -> int:
    """Do what the parsed arguments say; the exit code. Bad input raises a ValueError of this package or of the engine's.

    args.words: what was typed after `python -m engine`.
    """
    import torch
    import transformers

    from engine.fusion.checkpoint import OutOfTime
    from engine.fusion.fuse import check_output
    from engine.fusion.report import draw, render, summary
    from engine.fusion.workers import repeatable_arithmetic

    output = Path(args.output)
    check_output(output)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    repeatable_arithmetic()
    torch.set_num_threads(1)  # so that sums do not depend on the number of workers, and workers leave each other the cores
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - began:6.1f} s] {line}", file=sys.stderr, flush=True)

    deadline = began + args.stop_after if args.stop_after is not None else None
    try:
        report = _report(args, output, device, deadline, log)
    except OutOfTime:
        log("the time is up; run the same command again to go on")
        return EXIT_TIME
    text = render(report)
    replace_text(output / "report.txt", text)
    told = summary(report, shlex.join(Path(word).name for word in args.words), time.monotonic() - began)
    replace_text(output / "summary.json", json.dumps(told, indent=1) + "\n")
    draw(report, output / "fused.png")
    sys.stdout.write(text)
    return 0 if all(row["holds"] for row in report["domains"].values()) else EXIT_FLOOR


def _report(args: argparse.Namespace, output: Path, device: str, deadline: float | None, log) -> dict:
    from engine.fusion.demo import demo
    from engine.fusion.domains import DomainError, load_domains
    from engine.fusion.fuse import Options, fuse
    from engine.fusion.search import EXACT
    from engine.fusion.train import Recipe

    named = args.compare.split(",") if args.compare else []
    wrong = [name for name in named if name not in COMPARE]
    if wrong:
        raise DomainError(f"--compare {wrong[0]!r}: there are {', '.join(COMPARE)}")
    if args.retries not in ("auto", "all") and not args.retries.isdigit():
        raise DomainError(f"--retries {args.retries!r}: a number, or all")
    given = int(args.retries) if args.retries.isdigit() else None
    if args.what == "demo":
        if args.model or args.domains:
            raise DomainError("demo makes model and domains itself; leave --model and --domains out, or leave demo out")
        retries = DEMO_RETRIES if args.retries == "auto" else given
        compare = COMPARE if args.compare is None else tuple(named)
        return demo(output, args.size, compare=compare, retries=retries, workers=args.workers, device=device, jobs=args.jobs,
                    seed=args.seed, graphs=not args.no_graphs, deadline=deadline, log=log)  # fmt: skip
    if not args.model or not args.domains:
        raise DomainError("--model and --domains are needed (or `demo`, which makes both)")
    recipe = Recipe(rank=args.rank, alpha=args.rank / 4, dropout=0.1, learning_rate=2e-4, seed=args.seed)
    changes = {"steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate}
    recipe = replace(recipe, **{key: value for key, value in changes.items() if value is not None})
    retries = given
    if args.retries == "auto":
        retries = None if len(load_domains(args.domains)) <= EXACT else DEFAULT_RETRIES
    options = Options(recipe, retries, tuple(named), workers=args.workers, graphs=not args.no_graphs)
    return fuse(args.model, args.domains, output, options, device=device, deadline=deadline, log=log)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = SuggestingParser("python -m engine fuse", description=__doc__.split("\n", maxsplit=1)[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.words = ["fuse", *(sys.argv[1:] if argv is None else argv)]
    try:
        return run(args)
    except (ValueError, OSError) as error:  # every error of bad input is a ValueError
        return parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())

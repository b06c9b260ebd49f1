"""`python -m kernels tune | bench | verdict`: the operator's tile table, its figures and what they say.

tune and bench measure on this machine's GPU; verdict reads a results file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch

    from kernels import results, verdict
    from kernels.batch import LoraError
    from kernels.tiles import FORMS
except ModuleNotFoundError as error:
    sys.exit(f"the kernels need {error.name}, which is not installed: pip install 'valora[engine]' brings it")


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, or 2 with one line on stderr for what cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    tune = commands.add_parser("tune", help="search tilings and write this GPU's table; goes on where it stopped")
    tune.add_argument("--out", type=Path, help="table to write or to go on with; default: the one that is looked up")
    tune.add_argument("--budget", type=float, default=540.0, metavar="S", help="stop after about S seconds")
    tune.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="forms to search")
    tune.add_argument("--again", type=int, nargs="+", metavar="RANK", default=(), help="search known shapes too")
    tune.add_argument("--tokens", type=int, nargs=2, default=(1, 1 << 30), metavar=("LEAST", "MOST"),
                      help="of those, only of so many tokens")  # fmt: skip
    bench = commands.add_parser("bench", help="measure the grid with the rivals, write it and say what it shows")
    bench.add_argument("--out", type=Path, required=True, help="results file to write; a drawing goes beside it")
    bench.add_argument("--budget", type=float, default=540.0, metavar="S", help="after S seconds no further rival")
    bench.add_argument("--keep", type=Path, metavar="FILE", help="results whose rivals' rows stand; measure the others")
    say = commands.add_parser("verdict", help="say what a results file shows")
    say.add_argument("file", type=Path, nargs="?", default=results.FOLDER / "operators_h200.csv")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except LoraError as error:
        print(f"kernels {args.command}: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    """One command; LoraError for what the user can put right."""
    if args.command == "verdict":
        print(verdict.report(args.file))
        return 0
    if not torch.cuda.is_available():
        raise LoraError("there is no CUDA GPU here to measure")
    if args.command == "bench":
        from kernels.bench import bench
        from kernels.plot import draw

        bench(args.out, budget_s=args.budget, keep=args.keep)
        draw(args.out, args.out.with_suffix(".png"))
        print(verdict.report(args.out))
        return 0
    from kernels.tune import tune

    def again(shape):
        return shape.rank in args.again and args.tokens[0] <= shape.tokens <= args.tokens[1]

    print(tune(args.out, budget_s=args.budget, forms=tuple(args.forms), again=again))
    return 0


if __name__ == "__main__":
    sys.exit(main())

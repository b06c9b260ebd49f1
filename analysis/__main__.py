"""`python -m analysis compare DIR...` and `python -m analysis figures --in DIR --out DIR`: results, from files alone.

Tables to stdout, paths of what was drawn to stderr. Exit codes: 0, 2 (bad input).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.compare import comparison, labels
from traces.result_files import FIGURES, ResultError, read_results
from traces.suggest import SuggestingParser


def build_parser() -> argparse.ArgumentParser:
    parser = SuggestingParser("python -m analysis", description="Compare results that --output wrote.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|figures")
    compare = commands.add_parser("compare", help="print the policies of one or several results side by side")
    compare.add_argument("directories", nargs="+", metavar="DIR", help="a directory that --output wrote")
    compare.add_argument("--per-adapter", action="store_true", help="a table of the adapters of each policy as well")
    compare.add_argument("--plot", action="store_true", help=f"draw them too, into --out (default: DIR/{FIGURES})")
    compare.add_argument("--out", metavar="DIR", help="where --plot draws; needed when several results are compared")
    figures = commands.add_parser("figures", help="draw PNG, SVG and CSV")
    figures.add_argument("--in", dest="directories", nargs="+", required=True, metavar="DIR", help="results")
    figures.add_argument("--out", required=True, metavar="DIR", help="where the figures go; made where it is absent")
    return parser


def draw(directories: Sequence[str], out: str | Path) -> None:
    """Draw every figure of the results and say on stderr where they are."""
    from analysis.figures import policies

    names = labels(directories)
    results = {names[place, result.policy]: result for place in directories for result in read_results(place)}
    for path in policies(results, out):
        print(f"wrote {path}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    directories = list(dict.fromkeys(args.directories))
    try:
        if args.command == "figures":
            draw(directories, args.out)
            return 0
        if args.out and not args.plot:
            parser.error("--out says where --plot draws; add --plot")
        if args.plot and len(directories) > 1 and not args.out:
            parser.error("--plot with several directories needs --out DIR")
        print(comparison(directories, args.per_adapter), end="")
        if args.plot:
            draw(directories, args.out or Path(directories[0]) / FIGURES)
    except (ResultError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

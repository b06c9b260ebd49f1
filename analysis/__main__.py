"""`python -m analysis compare|figures|report|validate`: results side by side, as figures, and as one page; a simulator held
against an engine; from files alone.

Tables to stdout, paths of what was written to stderr. Exit codes: 0, 2 (bad input).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.compare import comparison
from analysis.draw import FIGURES as DRAWN
from analysis.draw import check_names, draw
from traces.result_files import FIGURES, ResultError
from traces.suggest import SuggestingParser
from traces.whole_file import replace_text

INPUTS = "directories that --output wrote, FILE.jsonl of a sweep, FILE.json of a search for capacity, FILE.csv of operators"


def build_parser() -> argparse.ArgumentParser:
    """The command line of all four."""
    parser = SuggestingParser("python -m analysis", description="Compare results, draw them, and write a report.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|figures|report|validate")
    compare = commands.add_parser("compare", help="print the policies of one or several results side by side")
    compare.add_argument("directories", nargs="+", metavar="DIR", help="a directory that --output wrote")
    compare.add_argument("--per-adapter", action="store_true", help="a table of the adapters of each policy as well")
    compare.add_argument("--plot", action="store_true", help=f"draw them too, into --out (default: DIR/{FIGURES})")
    compare.add_argument("--out", metavar="DIR", help="where --plot draws; needed when several results are compared")
    figures = commands.add_parser("figures", help="draw PNG, SVG and CSV")
    figures.add_argument("--in", dest="inputs", nargs="+", required=True, metavar="PATH", help=INPUTS)
    figures.add_argument("--out", required=True, metavar="DIR", help="where the figures go; made where it is absent")
    figures.add_argument("--only", metavar="NAME,...", help=f"some of {', '.join(DRAWN)} (default: all the inputs allow)")
    report = commands.add_parser("report", help="write one self-contained HTML page")
    report.add_argument("inputs", nargs="+", metavar="PATH", help=INPUTS)
    report.add_argument("--output", required=True, metavar="FILE.html", help="the page; replaced where it is there")
    report.add_argument("--title", help="the question it answers (default: made from the inputs)")
    for command in (figures, report):
        command.add_argument("--where", action="append", default=[], metavar="OPTION=VALUE",
                             help="only the runs of sweeps with this, e.g. adapters=16; may be repeated")  # fmt: skip
    validate = commands.add_parser("validate", help="hold the simulator against engine replays of the same traces")
    validate.add_argument("engines", nargs="+", metavar="ENGINE_DIR", help="what engine replay or campaign wrote")
    validate.add_argument("--sim", nargs="+", default=[], metavar="DIR",
                          help="where python -m sim replicate wrote (default: ENGINE_DIR-sim)")  # fmt: skip
    validate.add_argument("--each", action="store_true", help="of many replays, print each with its steps by kind as well")
    validate.add_argument("--out", metavar="DIR", help="write the tables there, as CSV and Markdown, and draw both "
                          "distributions of every latency")  # fmt: skip
    return parser


def say(drawn: dict[str, list[Path]]) -> None:
    """What was written, on stderr."""
    for paths in drawn.values():
        for path in paths:
            print(f"wrote {path}", file=sys.stderr)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """One command. Raises ResultError or OSError."""
    if args.command == "figures":
        say(draw(args.inputs, args.out, check_names(args.only), args.where, lambda text: print(text, file=sys.stderr)))
        return
    if args.command == "report":
        from analysis.report import write_report

        print(f"wrote {write_report(args.inputs, args.output, args.title, args.where)}", file=sys.stderr)
        return
    if args.command == "validate":
        validate(args)
        return
    directories = list(dict.fromkeys(args.directories))
    for path in directories:
        if Path(path).is_file():
            raise ResultError(f"{path}: compare takes directories; of a file `python -m analysis figures --in {path}` draws")
    if args.out and not args.plot:
        parser.error("--out says where --plot draws; add --plot")
    if args.plot and len(directories) > 1 and not args.out:
        parser.error("--plot with several directories needs --out DIR")
    print(comparison(directories, args.per_adapter), end="")
    if args.plot:
        say(draw(directories, args.out or Path(directories[0]) / FIGURES, ["policies"]))


def validate(args: argparse.Namespace) -> None:
    """Tables to stdout; files, and one figure a replay, into --out. Raises ResultError."""
    from analysis import validate_paper, validate_table
    from analysis.validate import pairs, report, verdict

    found = pairs(list(dict.fromkeys(args.engines)), args.sim)
    places = list(dict.fromkeys(pair.place for pair in found))
    rows = validate_table.rows_of(found)
    if len(places) == 1 or args.each:
        print(report(found), end="")
    if len(places) > 1:
        print("\n".join([validate_table.text(rows), validate_paper.text(found), *verdict(found)]))
    if args.out:
        from analysis.validate_figure import draw as draw_pairs

        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        said = "\n".join([validate_table.markdown(rows), validate_paper.markdown(found), *verdict(found)])
        written = [replace_text(folder / "validate.csv", validate_table.as_csv(rows)),
                   replace_text(folder / "policies.csv", validate_paper.as_csv(found)),
                   replace_text(folder / "validate.md", said + "\n")]  # fmt: skip
        say({"tables": written})
        for place in places:
            group = [pair for pair in found if pair.place == place]
            name = Path(place).name.replace(".", "_")  # what follows a dot is taken for the kind of file
            say({place: draw_pairs(group, folder / f"validate-{name}")})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        run(args, parser)
    except (ResultError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

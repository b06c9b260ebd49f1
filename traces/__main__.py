"""`python -m traces inspect|synth|convert`: look at a trace, make one, or turn one into another format.

Results go to stdout or the named file, remarks to stderr. Exit code 2 and one line on stderr for bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from traces import writers
from traces.inspect import describe
from traces.options import (
    add_adapter_arguments,
    add_reading_arguments,
    add_selection_arguments,
    assigned,
    count,
    open_trace,
    select,
)
from traces.request import Trace, TraceError
from traces.suggest import SuggestingParser
from traces.synth import KINDS, synthesize


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except TraceError as error:
        print(f"python -m traces: error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our stdout had enough, as in `| head`
        sys.stderr.close()
        return 0
    return 0


def _parser() -> SuggestingParser:
    parser = SuggestingParser(prog="python -m traces", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="inspect|synth|convert")

    look = commands.add_parser("inspect", help="describe a trace")
    look.add_argument("trace", nargs="?", metavar="FILE", help="default: the sample that ships")
    add_reading_arguments(look)
    look.set_defaults(run=_inspect)

    make = commands.add_parser("synth", help="write a synthetic trace in Azure's format")
    make.add_argument("kind", choices=KINDS, help="code, conv: Azure LLM 2023; lmm: Azure LMM 2025")
    make.add_argument("--requests", type=count, required=True, metavar="N")
    make.add_argument("--seed", type=count, default=0, metavar="N")
    make.add_argument("--output", required=True, metavar="FILE", help="written whole or not at all; .gz compresses")
    make.set_defaults(run=_synth)

    turn = commands.add_parser("convert", help="write a trace in another format")
    turn.add_argument("input", metavar="IN")
    turn.add_argument("output", metavar="OUT", help="written whole or not at all; .gz compresses")
    turn.add_argument("--to", choices=writers.FORMATS, default="ours", help="format of OUT (default ours)")
    add_reading_arguments(turn)
    add_selection_arguments(turn)
    add_adapter_arguments(turn)
    turn.set_defaults(run=_convert)
    return parser


def _inspect(args: argparse.Namespace) -> None:
    for line in describe(open_trace(args.trace, args)):
        print(line)
    sys.stdout.flush()


def _synth(args: argparse.Namespace) -> None:
    _write(synthesize(args.kind, args.requests, args.seed), args.output, "azure")


def _convert(args: argparse.Namespace) -> None:
    if Path(args.output).resolve() == Path(args.input).resolve():
        raise TraceError(f"{args.output}: is the trace that is read; name another file")
    trace = select(open_trace(args.input, args), args)
    if args.adapter_assign or args.adapters is not None or args.ranks is not None:
        trace = assigned(trace, args)
    _write(trace, args.output, args.to)


def _write(trace: Trace, output: str, format: str) -> None:
    for sentence in writers.write_trace(trace, output, format):
        print(f"lost: {sentence}", file=sys.stderr)
    print(f"wrote {len(trace)} requests to {Path(output)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

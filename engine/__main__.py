"""`python -m engine replay | campaign | baseline | generate | make-adapters | fuse | profile`: serve a trace, or many, also
beside PEFT, answer one prompt, make or train adapters, measure what the simulator needs to know.

Results go to stdout, progress, timing and errors to stderr. Exit codes: 0, 1 (`campaign`: cells failed), 2 (bad input; one
line that says where and what to do), 3 (an invariant was broken: a bug, not bad input), 75 (`campaign`, `fuse`, `profile`:
the time was up, the same command goes on), 130 (interrupted; what had finished was written).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.fusion.__main__ import add_arguments as add_fuse_arguments
from engine.options import (
    add_baseline_arguments,
    add_campaign_arguments,
    add_generate_arguments,
    add_make_adapters_arguments,
    add_profile_arguments,
    add_replay_arguments,
)
from policies import PolicyError, known_policies
from policies.invariants import InvariantError
from policies.plan import PlanError
from traces.options import SuggestingParser


def build_parser() -> SuggestingParser:
    parser = SuggestingParser("python -m engine", description="Serve many LoRA adapters on one multimodal model, really.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_replay_arguments(commands.add_parser("replay", help="replay a trace on this machine", description=(
        "Replay a trace through LoRA serving policies on this machine's GPU.")), known_policies())  # fmt: skip
    add_campaign_arguments(commands.add_parser("campaign", help="replay many traces, resumable", description=(
        "Replay every trace of a campaign under each of its policies; killed, the same command goes on.")))  # fmt: skip
    add_baseline_arguments(commands.add_parser("baseline", help="replay beside transformers + PEFT", description=(
        "Replay a trace in a closed loop, and serve its first requests by transformers with PEFT; tokens/s of both.")),
        known_policies())  # fmt: skip
    add_generate_arguments(commands.add_parser("generate", help="answer one prompt", description="Answer one prompt."))
    add_make_adapters_arguments(commands.add_parser("make-adapters", help="write random adapters in PEFT's format",
                                description="Write random adapters in PEFT's format."))  # fmt: skip
    add_fuse_arguments(commands.add_parser("fuse", help="pack domains into the fewest adapters", description=(
        "Train the fewest LoRA adapters that keep each domain above its accuracy floor.")))  # fmt: skip
    add_profile_arguments(commands.add_parser("profile", help="measure this GPU for the simulator", description=(
        "Measure this GPU under one model and write the simulator's latency profile. Resumable.")))  # fmt: skip
    return parser


def run(args: argparse.Namespace) -> int:
    """The chosen command. torch is imported here: a misspelt option is answered at once."""
    if args.command in ("replay", "baseline"):
        from engine.serve import replay

        return replay(args)
    if args.command == "campaign":
        if not (args.output or args.dry_run):
            raise ValueError("--output DIR says where the records go; --dry-run writes none")
        from engine.campaign import campaign

        return campaign(args)
    if args.command == "generate":
        from engine.generate import generate

        return generate(args)
    if args.command == "profile":
        from engine.profile import profile

        return profile(args)
    if args.command == "fuse":
        from engine.fusion.__main__ import run as fuse

        return fuse(args)
    from engine.generate import make_adapters

    return make_adapters(args)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    args.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(args)
    except (PlanError, InvariantError) as error:
        print(f"{parser.prog}: invariant broken: {error}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        parser.error(f"the engine needs {error.name}, which is not installed: pip install 'valora[engine]' brings it")
    except (PolicyError, ValueError, OSError) as error:  # every error of bad input is a ValueError
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout, `head` say, has seen enough
        sys.stdout = None
        return 0


if __name__ == "__main__":
    sys.exit(main())

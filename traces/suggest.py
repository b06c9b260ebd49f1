"""Near names: an argument parser, and a phrase, that tell a person what they probably meant.

Knows spelling only; what a flag or a column means is its owner's business.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable


def near(word: str, known: Iterable[str]) -> str:
    """" (did you mean 'x'?)" for the closest of `known`, or an empty string when none is close."""
    names = [str(name) for name in known]
    folded = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(str(word).casefold(), folded, n=1, cutoff=0.6)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


ELSEWHERE = {
    "--request-rate": "--rate", "--num-prompts": "--max-requests", "--max-concurrency": "--closed-loop",
    "--dataset-path": "--trace", "--result-dir": "--output", "--save-result": "--output",
    "--lora-assignment": "--adapter-assign", "--max-num-seqs": "--max-batch",
    "--max-num-batched-tokens": "--max-batch-tokens", "--block-size": "--page-tokens",
    "--data-parallel-size": "--gpus", "--replay-speedup": "--time-scale",
}  # fmt: skip
"""What other serving benchmarks call an option -> what it is here."""


class SuggestingParser(argparse.ArgumentParser):
    """argparse, but an unknown flag or choice names the near one; one line on stderr, exit code 2.

    Abbreviated flags are refused: `--rate` must not mean another flag once a longer one is added.
    """

    def __init__(self, *args, allow_abbrev: bool = False, **kwargs):
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args=None, namespace=None):
        """As argparse; the arguments are kept for `error`."""
        self._given = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def parse_args(self, args=None, namespace=None):
        """As argparse; unknown arguments end the program with the nearest known flag."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return parsed

    def _unknown(self, argument: str) -> str:
        flag, flags = argument.split("=", 1)[0], self._all_flags()
        hint = near(flag, flags) if argument.startswith("-") else ""
        if ELSEWHERE.get(flag) in flags:
            hint = f" (here it is {ELSEWHERE[flag]})"
        return f"unknown argument {argument!r}{hint or f'; {self.prog} --help lists the known ones'}"

    def error(self, message: str):
        """Print one line to stderr and exit with code 2. A misspelt flag is named before the one it leaves missing."""
        flags = self._all_flags()
        misspelt = [word for word in self._given if word.startswith("--") and word.split("=", 1)[0] not in flags]
        if "required" in message and misspelt and misspelt[0] != "--":
            message = self._unknown(misspelt[0])
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            hint = near(value, known)
            raise argparse.ArgumentError(action, f"unknown value {value!r}{hint}; one of {', '.join(known)}")

    def _all_flags(self) -> list[str]:
        """The flags of this parser and of its subcommands."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    flags += [flag for flag in parser._option_string_actions if flag.startswith("--")]
        return flags

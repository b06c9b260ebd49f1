"""One run from its options to its summary: the unit that sweeps, the search for capacity and what-ifs repeat.

Options are those of `python -m sim`, by the same names and with the same meaning. Trace files and profiles are read once a
process and shared by the runs that follow. It knows nothing of how many runs there are and who runs them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from policies import Policy, PolicyError, make_policy, policy_options
from policies.profile import Profile
from sim.__main__ import build_parser, find_profile, sim_config
from sim.cluster import simulate
from traces.options import SAMPLE, load_trace, open_trace, with_slo
from traces.record import RunResult, parse_goodput, summarize
from traces.request import Trace, TraceError
from traces.suggest import near

OUTPUT_OPTIONS = ("output", "overwrite", "plot", "per_adapter", "progress", "no_error_bars")
"""Options that say where results go, which a run among many does not have."""

PACKAGES = ("traces", "policies", "sim")


class OptionError(ValueError):
    """An option that does not exist or has a value it cannot have. The message names it and the way out."""


def _raise(message: str) -> None:
    raise OptionError(message)


@lru_cache(1)
def _parser() -> argparse.ArgumentParser:
    parser = build_parser()
    parser.error = _raise
    return parser


@lru_cache(1)
def option_names() -> dict[str, argparse.Action]:
    """Option of one run (without its dashes) -> how the parser reads it."""
    flags = _parser()._option_string_actions.items()
    return {flag[2:]: a for flag, a in flags if flag.startswith("--") and a.dest not in (*OUTPUT_OPTIONS, "help")}


def parse_options(options: Mapping[str, str]) -> argparse.Namespace:
    """The namespace of one run from options as text; flags take true or false. Raises OptionError."""
    known, words = option_names(), []
    for name, text in options.items():
        if name not in known:
            raise OptionError(f"unknown option {name!r}{near(name, known)}; options are {', '.join(known)}")
        action = known[name]
        if action.nargs == 0:
            if text not in ("true", "false"):
                raise OptionError(f"{name}: {text!r} is neither true nor false")
            words += [f"--{name}"] if text == "true" else []
        elif action.nargs == "+":
            words += [f"--{name}", *text.split()]
        elif isinstance(action, argparse._AppendAction):
            words += [f"--{name}={part}" for part in text.split()]
        else:
            words.append(f"--{name}={text}")
    args = _parser().parse_args(words)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise, before anything runs, what a run with these options would raise but for the contents of its trace."""
    if "," in args.policy or not args.policy.strip():
        raise PolicyError(f"policy {args.policy!r}: one policy a run")
    policy_of(args)
    parse_goodput(args.goodput)
    sim_config(args, profile_of(args))


def policy_of(args: argparse.Namespace) -> Policy:
    """The policy that the options name. PolicyError for a wrong name or value."""
    return make_policy(args.policy, policy_options([args.policy], args.policy_option)[args.policy])


@lru_cache(8)
def _profile(name: str | None, model: str) -> Profile:
    return find_profile(name, model)


def profile_of(args: argparse.Namespace) -> Profile:
    """The profile that the options name."""
    return _profile(args.profile, args.model)


@lru_cache(4)
def _file(path: str | None, how: str) -> Trace:
    options = json.loads(how)
    return open_trace(path, argparse.Namespace(**options))


def trace_file(args: argparse.Namespace) -> Trace:
    """The trace file as it is, read once a process."""
    how = {name: getattr(args, name) for name in ("trace_format", "columns", "images", "bad_rows")}
    return _file(args.trace, json.dumps(how, sort_keys=True))


def trace_of(args: argparse.Namespace, file: Trace | None = None) -> Trace:
    """The trace that the options describe. file: the trace file, where somebody read it already."""
    trace = load_trace(args, profile_of(args), trace_file(args) if file is None else file)
    return with_slo(trace, parse_goodput(args.goodput))


def run(args: argparse.Namespace, file: Trace | None = None) -> RunResult:
    """Simulate. Raises what is wrong with the options or the trace."""
    profile = profile_of(args)
    config = sim_config(argparse.Namespace(**vars(args) | {"output": None}), profile)
    return simulate(trace_of(args, file), policy_of(args), profile, config)


def summary(args: argparse.Namespace, file: Trace | None = None) -> dict:
    """`traces.record.summarize` of a run."""
    return summarize(run(args, file), parse_goodput(args.goodput))


def settings(args: argparse.Namespace) -> dict:
    """The resolved options of a run as JSON-able data, under the names of the command line."""
    known = {action.dest: name for name, action in option_names().items()}
    return {name: json.loads(json.dumps(getattr(args, dest))) for dest, name in sorted(known.items())}


@lru_cache(64)
def trace_sha256(path: str | None) -> str:
    """Hash of the bytes of a trace file. Raises TraceError."""
    try:
        with open(SAMPLE if path is None else path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or error}; name a trace that exists") from None


def key_of(args: argparse.Namespace, variant: str = "") -> str:
    """Hash of everything a run's result depends on: options, contents of trace, profile and, of a policy from elsewhere, its
    file. Where files lie is no part."""
    parts = settings(args) | {"trace": trace_sha256(args.trace), "profile": profile_of(args).sha256, "variant": variant}
    kind = type(policy_of(args))
    if kind.__module__.partition(".")[0] not in PACKAGES:
        parts["policy_sha256"] = _module_sha256(kind.__module__)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(8)
def _module_sha256(name: str) -> str:
    """Hash of the source of an imported module, empty where there is none."""
    path = getattr(sys.modules[name], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


@lru_cache(1)
def code_sha256(packages: Iterable[str] = PACKAGES) -> str:
    """Hash of the sources of the simulator: rows made by another version of it can be told apart."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[1]
    for path in sorted(path for package in packages for path in (root / package).glob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()

"""A campaign in a YAML file: named replays whose keys are the options of `python -m engine replay`, without their dashes.

    defaults: {model: llava-1.5-7b, policy: [valora, slora], adapters: 16, drain: 10}
    replays:
      conv: {trace: AzureLLMInferenceTrace_conv.csv, start: 600, duration: 60}      # its name names its folder
      light: {trace: AzureLLMInferenceTrace_conv.csv, rate: 1, adapters: 4}         # what it says goes before the defaults

Values are taken as they are written, as on the command line; a list is one option's several values. Traces lie in the folder
of `--traces`, other files beside the campaign. Strict: an unknown or doubled key, or a value that an option cannot have, is
an error with its place. A cell is one replay under one policy. It runs nothing and needs no torch.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from engine.options import add_replay_arguments
from policies import Policy, known_policies, make_policies
from traces.options import SAMPLE
from traces.record import parse_goodput
from traces.strict_yaml import StrictYaml
from traces.suggest import SuggestingParser

FOLDER = Path(__file__).parent / "campaigns"
"""Campaigns that ship; their names may stand for their files."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
NOT_OURS = ("output", "overwrite", "progress", "per_adapter", "help")
"""Options that a campaign sets, or has no place for."""
NOT_THE_RESULT = ("policy", "policy_option", "warmup", "check_invariants", *NOT_OURS)
"""Options that a record's hash leaves out: policies count one by one, the others change nothing that is measured."""
BESIDE = ("profile", "adapter-dir")
"""Options with paths, relative to the campaign's folder."""


class CampaignError(ValueError):
    """A campaign that cannot be run. The message names file, line, column and value, and the way out."""


@dataclass(frozen=True)
class Cell:
    """One replay under one policy. args: as `engine replay` parses them. trace: its file (None: the sample that ships)."""

    replay: str
    policy: Policy
    args: argparse.Namespace

    @property
    def name(self) -> str:
        """What `--only` and messages call it."""
        return f"{self.replay}/{self.policy.name}"

    @property
    def model(self) -> tuple:
        """Cells with the same share a model in memory."""
        return tuple(getattr(self.args, name) for name in ("model", "device", "dtype", "seed"))

    def options(self) -> dict:
        """What its record depends on, by option; trace and profile by their files' names and contents. JSON-able."""
        chosen = {name: value for name, value in sorted(vars(self.args).items()) if name not in NOT_THE_RESULT}
        for name, path in (("trace", chosen["trace"] or SAMPLE), ("profile", chosen["profile"])):
            if path is not None:
                chosen |= {name: Path(path).name, f"{name}_sha256": _digest(Path(path))}
        chosen |= {name: chosen[name] and Path(chosen[name]).name for name in ("model", "adapter_dir")}  # they may move
        chosen["policy"] = {"name": self.policy.name, **asdict(self.policy)}
        return json.loads(json.dumps(chosen, default=str))

    def stamp(self, device: str) -> dict:
        """What a record keeps of its cell: `sha256` of its options and of the device's name, and both."""
        facts = {"options": self.options(), "device": device}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return {"replay": self.replay, "sha256": digest, **facts}


@lru_cache(16)
def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CampaignError(f"{path}: {error.strerror}; traces lie in --traces, profiles beside the campaign") from None


def read_campaign(path: str | Path, traces: str | Path | None) -> list[Cell]:
    """All cells of a campaign (a file, or the name of one that ships), replay by replay. Raises CampaignError."""
    shipped = FOLDER / f"{path}.yaml"
    if not Path(path).exists() and shipped.exists():
        path = shipped
    known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
    reader = _Reader(path, traces)
    return list(reader.cells(reader.root(f"name a YAML file, or one of {known}")))


def chosen(cells: list[Cell], pattern: str | None) -> list[Cell]:
    """Cells whose replay, or replay/policy, matches one of the shell patterns in `pattern`, with commas between."""
    patterns = [part.strip() for part in (pattern or "*").split(",")]
    found = [cell for cell in cells if any(fnmatch.fnmatch(name, p) for p in patterns for name in (cell.replay, cell.name))]
    if not found:
        names = ", ".join(dict.fromkeys(cell.replay for cell in cells))
        raise CampaignError(f"--only {pattern!r} leaves nothing; replays are {names}, and a cell is replay/policy")
    return found


def in_order(cells: list[Cell]) -> list[Cell]:
    """The cells as they are best run: one model after another, and cells that an engine serves without being built anew
    behind each other; else as they stand."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    engines: list[tuple] = []
    for cell in cells:
        if (key := engine_key(cell)) not in engines:
            engines.append(key)
    return sorted(cells, key=lambda cell: (models.index(cell.model), engines.index(engine_key(cell))))


def engine_key(cell: Cell) -> tuple:
    """What an engine is built for, as far as options tell."""
    names = ("adapters", "ranks", "targets", "adapter_dir", "operator", "memory_share", "adapter_memory", "page_tokens",
             "max_batch", "max_batch_tokens", "max_context", "no_prefix_cache", "no_graphs", "profile")  # fmt: skip
    return (*cell.model, repr(cell.policy), cell.policy.name, *(getattr(cell.args, name) for name in names))


@lru_cache(1)
def _parser() -> SuggestingParser:
    parser = SuggestingParser("replay")
    add_replay_arguments(parser, known_policies())

    def fail(message: str) -> None:
        raise ValueError(message)

    parser.error = fail
    return parser


class _Reader(StrictYaml):
    def __init__(self, path: str | Path, traces: str | Path | None):
        super().__init__(path, CampaignError, "a campaign", "replays: {conv: {trace: conv.csv}}")
        self.traces = traces
        flags = _parser()._option_string_actions.items()
        self.known = {flag[2:]: a for flag, a in flags if flag.startswith("--") and a.dest not in NOT_OURS}

    def cells(self, root: yaml.Node | None) -> Iterator[Cell]:
        parts = dict(self.pairs(root, "a campaign", ("defaults", "replays")))
        if "replays" not in parts:
            self.fail(root, "has no replays; name some, as in `replays: {conv: {trace: conv.csv}}`")
        defaults = self.options(parts["defaults"]) if "defaults" in parts else {}
        for name, node in self.pairs(parts["replays"], "replays", None):
            if not NAME.fullmatch(name):
                self.fail(node, f"replay {name!r} cannot name a folder; use letters, digits and ._-")
            yield from self.replay(name, node, defaults)

    def replay(self, name: str, node: yaml.Node, defaults: Mapping[str, list[str]]) -> Iterator[Cell]:
        """The cells of one replay."""
        own = self.options(node) if not (isinstance(node, yaml.ScalarNode) and not node.value) else {}
        paces = ("rate", "time-scale")  # one replaces the other
        kept = {key: values for key, values in defaults.items() if key not in paces or not own.keys() & set(paces)}
        merged = kept | own
        try:
            args = _parser().parse_args([word for key, values in merged.items() for word in self.words(key, values)])
            policies = make_policies(args.policy, args.policy_option)
            parse_goodput(args.goodput)
        except ValueError as error:
            self.fail(node, f"replay {name}: {error}")
        if args.trace is not None:
            if self.traces is None:
                self.fail(node, f"replay {name}: say with --traces in which folder {args.trace} lies")
            args.trace = str(Path(self.traces) / args.trace)
        for policy in policies:
            yield Cell(name, policy, args)

    def options(self, node: yaml.Node) -> dict[str, list[str]]:
        """option -> its values as text, each proved to be one that the option can have."""
        found = {}
        for key, value in self.pairs(node, "options of a replay", tuple(self.known)):
            nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not nodes or not all(isinstance(item, yaml.ScalarNode) for item in nodes):
                self.fail(value, f"{key}: expected one value, or a flat list of them")
            found[key] = [item.value for item in nodes]
            if key in BESIDE and ("/" in found[key][0] or (self.path.parent / found[key][0]).exists()):
                found[key] = [str(self.path.parent / found[key][0])]
            try:
                _parser().parse_args(self.words(key, found[key]))
            except ValueError as error:
                self.fail(value, str(error).removeprefix("argument "))
        return found

    def words(self, key: str, values: list[str]) -> list[str]:
        """The command line's form of an option."""
        action = self.known[key]
        if action.nargs == 0:
            if values not in (["true"], ["false"]):
                raise ValueError(f"{key}: {', '.join(values)} is neither true nor false")
            return [f"--{key}"] if values == ["true"] else []
        if action.nargs == "+":
            return [f"--{key}", *values]
        if isinstance(action, argparse._AppendAction):
            return [f"--{key}={value}" for value in values]
        return [f"--{key}={','.join(values)}"]

"""A grid of runs in a YAML file: each key an option of `python -m sim` without its dashes, a list an axis.

    trace: azure.csv                     # one value: the same in all runs; relative to the grid's folder
    policy: [valora, slora]              # a list: crossed with all other lists
    rate: [2, 4, 8]
    seed: [0, 1, 2]                      # runs that differ in nothing else are averaged
    variants:                            # one more axis, of named sets of options
      - {name: full}
      - {name: no mixture, policy-option: mixture=false}

Values are taken as they are written, not as YAML types: `no`, `1e3` and `1:30` mean what the command line would make of
them. Strict: a key that is unknown or stands twice, or a value an option cannot have, is an error with its place. It
runs nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from sim.experiment import OptionError, option_names, parse_options
from traces.strict_yaml import StrictYaml

MAX_RUNS = 1_000_000
PATHS = ("trace", "profile")
VARIANTS = "variants"


class GridError(ValueError):
    """A grid that cannot be run. The message names file, line, column and value."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its variant ("" without variants), what it has on each axis as text, and its options."""

    variant: str
    axes: dict[str, str]
    args: argparse.Namespace


@dataclass(frozen=True)
class Grid:
    """axes: option -> values, as text, in the order of the file, the seed last. variants: name -> options."""

    path: str
    fixed: dict[str, str]
    axes: dict[str, list[str]]
    variants: dict[str, dict[str, str]]

    def __len__(self) -> int:
        return len(self.variants) * math.prod(map(len, self.axes.values()))

    def cells(self) -> Iterator[Cell]:
        """All runs in a fixed order; those that differ in the seed alone follow each other. Raises GridError."""
        for name, options in self.variants.items():
            for values in itertools.product(*self.axes.values()):
                axes = dict(zip(self.axes, values, strict=True))
                try:
                    args = parse_options(self.fixed | axes | options)
                except ValueError as error:
                    raise GridError(f"{self.path}: {_said(name, axes)}: {error}") from None
                yield Cell(name, axes, args)


def _said(name: str, axes: dict[str, str]) -> str:
    return ", ".join([*([name] if name else []), *(f"{key} {value}" for key, value in axes.items())]) or "the one run"


def read_grid(path: str | Path, instead: dict[str, str] | None = None) -> Grid:
    """The grid in a YAML file; options in `instead` have one value, whatever the file says. Raises GridError."""
    reader = _Reader(path)
    grid = reader.grid(reader.root())
    for name, options in grid.variants.items():
        if both := sorted(set(options) & set(instead or {})):
            raise GridError(f"{path}: variant {name!r} sets {both[0]}, so it cannot have one value for all runs")
    axes = {name: values for name, values in grid.axes.items() if name not in (instead or {})}
    return replace(grid, fixed=grid.fixed | (instead or {}), axes=axes)


class _Reader(StrictYaml):
    def __init__(self, path: str | Path):
        super().__init__(path, GridError, "a grid", "policy: [valora, slora]")
        self.known = option_names()

    def grid(self, root: yaml.Node | None) -> Grid:
        """The grid in a document."""
        fixed, axes, variants = {}, {}, {"": {}}
        for key, value in self.pairs(root, "a grid", (*self.known, VARIANTS)):
            if key == VARIANTS:
                variants = self.variants(value)
            elif isinstance(value, yaml.SequenceNode):
                axes[key] = self.axis(key, value)
            else:
                fixed[key] = self.text(key, value)
        for name, options in variants.items():
            if twice := sorted(set(options) & set(axes)):
                self.fail(None, f"variant {name!r} sets {twice[0]}, which is an axis too; keep one of them")
        if "seed" in axes:
            axes["seed"] = axes.pop("seed")  # last, so that runs that are averaged follow each other
        grid = Grid(str(self.path), fixed, axes, variants)
        if len(grid) > MAX_RUNS:
            self.fail(None, f"{len(grid):,} runs; at most {MAX_RUNS:,}")
        return grid

    def variants(self, node: yaml.Node) -> dict[str, dict[str, str]]:
        """name -> options."""
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, "variants are a list of mappings, each with a name, as in `- {name: full}`")
        found: dict[str, dict[str, str]] = {}
        for item in node.value:
            options, name = {}, ""
            for key, value in self.pairs(item, "a variant", (*self.known, "name")):
                if key == "name":
                    name = self.scalar(key, value)
                else:
                    options[key] = self.text(key, value)
            if not name.strip() or name in found:
                self.fail(item, f"a variant needs a name of its own, got {name!r}")
            found[name] = options
        return found

    def axis(self, key: str, node: yaml.SequenceNode) -> list[str]:
        """The values of a list, none twice."""
        values = []
        for item in node.value:
            text = self.text(key, item)
            if text in values:
                self.fail(item, f"{key}: {text} stands twice")
            values.append(text)
        if not values:
            self.fail(node, f"{key}: an empty list leaves no run")
        return values

    def scalar(self, key: str, node: yaml.Node) -> str:
        """One value as it is written."""
        if not isinstance(node, yaml.ScalarNode):
            self.fail(node, f"{key}: expected one value, or a flat list of them")
        return node.value

    def text(self, key: str, node: yaml.Node) -> str:
        """The value as the command line would get it, proved to be one that the option can have."""
        text = self.scalar(key, node)
        if key in PATHS and (key == "trace" or text.endswith(".json") or "/" in text):
            text = str(self.path.parent / text)
        try:
            self.prove(key, text)
        except ValueError as error:
            self.fail(node, str(error).removeprefix("argument "))
        return text

    def prove(self, key: str, text: str) -> None:
        """Raise ValueError for a value that the option can never have."""
        if key == "policy-option":  # needs its policy; `Grid.cells` proves it
            return
        try:
            parse_options({key: text})
        except OptionError:
            raise
        except ValueError:
            # Other options may make it right (max-batch beside max-batch-tokens); `Grid.cells` proves the whole run.
            if key in ("policy", "profile"):
                raise

"""A YAML document read strictly, with the place of everything in it: for files in which people say what is to be run.

Values stay the text that was written (`no`, `1e3` and `1:30` mean what a command line would make of them), a key that is
unknown or stands twice is an error, and every error names file, line and column. It knows no key of any file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from traces.suggest import near


class StrictYaml:
    """One file. error: what is raised, with its place. what: it is called, in messages; example: of a mapping in it."""

    def __init__(self, path: str | Path, error: type[ValueError], what: str, example: str):
        self.path, self.error, self.what, self.example = Path(path), error, what, example

    def root(self, way_out: str = "name a YAML file") -> yaml.Node | None:
        """The document, None for an empty one. Raises `error` for what is none, or cannot be read."""
        try:
            return yaml.compose(self.path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            place = getattr(error, "problem_mark", None)
            where = f":{place.line + 1}:{place.column + 1}" if place else ""
            raise self.error(f"{self.path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from None
        except (OSError, ValueError) as error:
            raise self.error(f"{self.path}: {getattr(error, 'strerror', None) or error}; {way_out}") from None
        except RecursionError:
            raise self.error(f"{self.path}: nested too deeply for {self.what}") from None

    def fail(self, node: yaml.Node | None, message: str):
        """Raise `error` with the place of `node`."""
        where = f":{node.start_mark.line + 1}:{node.start_mark.column + 1}" if node else ""
        raise self.error(f"{self.path}{where}: {message}")

    def pairs(self, node: yaml.Node | None, what: str, known: Sequence[str] | None) -> Iterator[tuple[str, yaml.Node]]:
        """(key, value) of a mapping, each key there once and one of `known`, if any are given; _ may stand for -."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self.fail(node, f"{what} must be a mapping, as in `{self.example}`")
        seen = set()
        for name, value in node.value:
            key = name.value if isinstance(name, yaml.ScalarNode) else None
            if known is not None and key is not None and key not in known:
                key = key.replace("_", "-")
            if key is None or (known is not None and key not in known):
                hint = f"{near(key or '', known)}; known are {', '.join(known)}" if known else ""
                self.fail(name, f"unknown key {name.value!r} in {what}{hint}")
            if key in seen:
                self.fail(name, f"{key} stands twice")
            seen.add(key)
            yield key, value

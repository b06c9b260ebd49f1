"""The house rules, read from the source: who may import whom, names, sizes, docstrings, and what must not be in a file."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {  # room -> the rooms of ours that it may import
    "traces": set(),
    "policies": {"traces"},
    "kernels": set(),
    "sim": {"policies", "traces"},
    "engine": {"policies", "traces", "kernels"},
    "analysis": {"traces"},
}
LEAVES = {"traces": {"numpy", "pandas", "pyarrow", "yaml"}, "kernels": {"torch", "triton", "numpy", "matplotlib"}}
"""What they import beside the standard library."""
CHOOSERS = ("batching", "costaware", "dlora", "merged_only", "unmerged", "valora")
"""The modules in which policies choose: a plan is a pure function of the view."""

FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [*FILES, *TESTS, *ROOT.glob("*.md"), ROOT / "pyproject.toml"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path):
    """(line, top-level package) of every import, wherever in the file it stands."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield node.lineno, node.module.split(".")[0]


def breaches(rule) -> list[str]:
    """"file:line imports package" for every import that `rule(room, path, package)` forbids."""
    found = []
    for path in FILES:
        name, room = name_of(path), name_of(path).split("/")[0]
        found += [f"{name}:{line} imports {package}" for line, package in imports(path) if rule(room, path, package)]
    return found


def test_imports_run_downwards_only():
    assert breaches(lambda room, _, package: package in ROOMS.keys() - ROOMS[room] - {room}) == []


def test_leaves_import_only_what_they_may():
    known = {room: allowed | sys.stdlib_module_names | {room} for room, allowed in LEAVES.items()}
    assert breaches(lambda room, _, package: room in known and package not in known[room]) == []


def test_policies_are_pure():
    """No clock, no randomness, no simulator, no arrays where a policy decides."""
    forbidden = {"simpy", "torch", "triton", "numpy", "pandas", "time", "datetime", "random", "secrets", "os", "threading"}
    assert breaches(lambda room, path, package: room == "policies" and path.stem in CHOOSERS and package in forbidden) == []


def test_never_pickle():
    assert breaches(lambda _room, _path, package: package in {"pickle", "dill", "cloudpickle", "marshal", "shelve"}) == []


def test_names_say_something():
    vague = re.compile(r"(utils?|common|manager|helpers?|base_.*|misc)")
    assert [name_of(path) for path in FILES if any(vague.fullmatch(part) for part in (path.stem, path.parent.name))] == []


def functions(path: Path):
    """Every function and method: (first line, last line, qualified name)."""
    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                if not isinstance(child, ast.ClassDef):
                    yield child.lineno, child.end_lineno, prefix + child.name
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(TREES[path], "")


def test_files_and_functions_are_short():
    found = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > 400:
            found.append(f"{name_of(path)}: {lines} lines, at most 400")
        for first, last, name in functions(path):
            if last - first >= 60:
                found.append(f"{name_of(path)}:{first}: {name} has {last - first + 1} lines, at most 60")
    assert found == []


def public(tree: ast.Module):
    """Public classes and functions; `main` and `build_parser` of a command are explained by its module."""
    for node in tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        if named and not node.name.startswith("_") and node.name not in ("main", "build_parser"):
            yield node


def test_everything_public_says_what_it_does():
    silent = [name_of(path) for path in FILES if not ast.get_docstring(TREES[path])]
    silent += [f"{name_of(path)}:{node.lineno}: {node.name}" for path in FILES for node in public(TREES[path])
               if not ast.get_docstring(node)]  # fmt: skip
    assert silent == []


def test_kernels_is_not_what_transformers_looks_for():
    """transformers probes for a package named `kernels`; ours must be none in its eyes."""
    (only,) = TREES[ROOT / "kernels" / "__init__.py"].body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    from transformers.utils import is_kernels_available

    assert not is_kernels_available()


def test_no_path_of_anybodys_machine():
    machine = re.compile(r"""["'\s(=](/(home|Users|root|work|mnt|data|scratch|workspace)/\w|[A-Z]:\\\w)""")
    found = []
    for path in TEXTS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine.search(line) and path != Path(__file__).resolve():
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_nothing_is_left_for_later():
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError")
    found = []
    for path in FILES:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        found += [f"{name_of(path)}:{number}: {line.strip()[:100]}" for number, line in lines if mark.search(line)]
    assert found == []

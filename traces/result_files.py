"""Results on disk: one directory a run, written whole or not at all, and read back as the same `RunResult`s.

    DIR/summary.json             every policy: resolved configuration, hashes of trace and profile, summary, counters
    DIR/<policy>/requests.parquet, steps.parquet (where steps were recorded), itl.parquet, trace.json (for Perfetto)
    DIR/<policy>/leases.parquet, chunks.parquet   what an engine adds to its steps

Everything is written beside DIR and put in its place by one rename, so that a failure leaves the former results as they
were. It computes no metric (`record`) and knows nothing of what is shown (`result_tables`, analysis).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from traces.chrome_trace import write_chrome_trace
from traces.details import DETAIL_COLUMNS
from traces.record import REQUEST_COLUMNS, STEP_COLUMNS, RunResult

FORMAT = "lora-serving-results"
VERSION = 1
FIGURES = "figures"
"""Folder inside a results directory that analysis draws into; it goes when the results are overwritten."""

ITL_COLUMNS = ("gap_us", "count")
_FILES = ("requests.parquet", "steps.parquet", "itl.parquet", "trace.json", *(f"{name}.parquet" for name in DETAIL_COLUMNS))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ResultError(ValueError):
    """Results that cannot be read or may not be written. The message names the path and the way out."""


def check_target(directory: str | Path, overwrite: bool = False) -> Path:
    """The resolved directory, if results may be written there: absent, empty, or ours to overwrite.

    Ask before a long run. ResultError where something is in the way; files that are not results are never removed.
    """
    target = Path(directory).resolve()
    if not target.exists():
        there = next(parent for parent in target.parents if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ResultError(f"{directory}: nothing can be written in {there}; name another directory")
        return target
    if not target.is_dir():
        raise ResultError(f"{directory}: is a file; name a directory")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise ResultError(f"{directory}: is not empty; name another directory, or allow it to be overwritten")
    policies = set(read_summary(target)["policies"])
    for path in sorted(target.rglob("*")):
        top, *rest = path.relative_to(target).parts
        ours = top == FIGURES or (top == "summary.json" and not rest) or (top in policies and "/".join(rest) in _FILES)
        if not ours and not (top in policies and not rest):
            raise ResultError(f"{path}: is not part of the results; move it away before they are overwritten")
    return target


def write_results(
    directory: str | Path,
    results: Sequence[RunResult],
    summaries: Mapping[str, Mapping],
    adapters: Sequence[str],
    overwrite: bool = False,
) -> Path:
    """Write the results of one run, `summaries` by policy, `adapters` the names by index. Returns the directory.

    ResultError where `check_target` says so or a policy's name cannot be a folder; ValueError where a result
    contradicts itself (`RunResult.check`). Floats in summaries must be finite; in a configuration, infinity is written
    as the string "inf".
    """
    target = check_target(directory, overwrite)
    assert results, "a run has at least one policy"
    _check_names([result.policy for result in results])
    for result in results:
        result.check()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.mkdir()
        entries = {r.policy: _write_policy(partial / r.policy, r, summaries[r.policy], adapters) for r in results}
        document = {"format": FORMAT, "version": VERSION, "adapters": list(adapters), "policies": entries}
        text = json.dumps(document, indent=1, allow_nan=False, default=_plain) + "\n"
        (partial / "summary.json").write_text(text, encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            _fsync(path)
        _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_names(policies: Sequence[str]) -> None:
    for name in policies:
        if not _NAME.fullmatch(name) or name in (FIGURES, "summary.json"):
            raise ResultError(f"policy {name!r} cannot name a folder; use letters, digits and ._-")
        if policies.count(name) > 1:
            raise ResultError(f"policy {name!r} has two results; write them to two directories")


def _write_policy(folder: Path, result: RunResult, summary: Mapping, adapters: Sequence[str]) -> dict:
    """Write the files of one policy; returns its entry in summary.json."""
    folder.mkdir()
    _write_parquet(folder / "requests.parquet", {name: result.requests[name] for name in REQUEST_COLUMNS})
    _write_parquet(folder / "itl.parquet", dict(zip(ITL_COLUMNS, result.itl, strict=True)))
    if result.steps is not None:
        _write_parquet(folder / "steps.parquet", {name: result.steps[name] for name in STEP_COLUMNS})
    for name, table in result.details.items():
        _write_parquet(folder / f"{name}.parquet", {column: table[column] for column in DETAIL_COLUMNS[name]})
    with (folder / "trace.json").open("w", encoding="utf-8") as file:
        note = write_chrome_trace(result, tuple(adapters), file)
    return {
        "operator": result.operator,
        "config": _finite(result.config),
        "summary": dict(summary),
        "counters": result.counters,
        "time_ns": result.time_ns,
        "notes": [note] if note else [],
    }


def _put_in_place(partial: Path, target: Path) -> None:
    """Rename `partial` to `target`; a former target comes back if that fails.

    A process killed between the two renames leaves the former results whole, as `.<name>.<id>.former` beside.
    """
    if not target.exists() or not any(target.iterdir()):
        os.replace(partial, target)  # POSIX replaces an empty directory
    else:
        former = partial.with_suffix(".former")
        os.replace(target, former)
        try:
            os.replace(partial, target)
        except BaseException:
            os.replace(former, target)
            raise
        shutil.rmtree(former)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_parquet(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(dict(columns)), path, compression="zstd")


def _plain(value):
    """numpy's scalars as Python's, for json."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def _finite(value):
    """The value with infinities as strings: a configuration may hold one (no limit), JSON may not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def results_below(directory: str | Path) -> list[Path]:
    """`directory` itself if it holds results, else the folders in it that do, by name. ResultError where there are none."""
    root = Path(directory)
    if (root / "summary.json").exists() or not root.is_dir():
        return [root]
    found = sorted(path.parent for path in root.glob("*/summary.json") if not path.parent.name.startswith("."))
    if not found:
        raise ResultError(f"{directory}: holds no results, nor does a folder in it; name a directory that --output wrote")
    return found


def read_summary(directory: str | Path) -> dict:
    """summary.json of a results directory, as written. ResultError where there is none, or not one of ours."""
    path = Path(directory) / "summary.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultError(f"{path}: does not exist; name a directory that --output wrote") from None
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path}: is not JSON ({error}); write the results again") from None
    except OSError as error:
        raise ResultError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ResultError(f"{path}: is not a summary of results; name a directory that --output wrote")
    if document.get("version") != VERSION:
        raise ResultError(f"{path}: has version {document.get('version')!r}, this reads {VERSION}; run it again")
    policies = document.get("policies")
    parts = {"operator": str, "config": dict, "summary": dict, "counters": dict, "time_ns": dict}
    if not isinstance(policies, dict) or not policies or not all(map(_NAME.fullmatch, policies)):
        raise ResultError(f"{path}: 'policies' are missing or misnamed; write the results again")
    for policy, entry in policies.items():
        for name, kind in parts.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), kind):
                raise ResultError(f"{path}: policy {policy!r} lacks a valid {name!r}; write the results again")
    return document


def read_results(directory: str | Path) -> list[RunResult]:
    """The results in a directory, in the order they were written. ResultError names the file that is damaged."""
    results = []
    for policy, entry in read_summary(directory)["policies"].items():
        folder = Path(directory) / policy
        steps = folder / "steps.parquet"
        gaps = _read_parquet(folder / "itl.parquet", ITL_COLUMNS)
        result = RunResult(
            policy=policy,
            operator=entry["operator"],
            requests=_read_parquet(folder / "requests.parquet", REQUEST_COLUMNS),
            steps=_read_parquet(steps, STEP_COLUMNS) if steps.exists() else None,
            itl=(gaps["gap_us"], gaps["count"]),
            counters=entry["counters"],
            time_ns=entry["time_ns"],
            config=entry["config"],
            details={
                name: _read_parquet(folder / f"{name}.parquet", columns)
                for name, columns in DETAIL_COLUMNS.items()
                if (folder / f"{name}.parquet").exists()
            },
        )
        try:
            result.check()
        except ValueError as error:
            raise ResultError(f"{folder}: {error}") from None
        results.append(result)
    return results


def _read_parquet(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ResultError(f"{path}: cannot be read ({str(error).splitlines()[0]}); write the results again") from None
    columns = {}
    for name in names:
        if name not in table.column_names:
            raise ResultError(f"{path}: lacks the column {name!r}; write the results again")
        column = table.column(name)
        if column.null_count or not (pyarrow.types.is_integer(column.type) or pyarrow.types.is_floating(column.type)):
            raise ResultError(f"{path}: column {name!r} holds {column.type} or empty cells, expected plain numbers")
        columns[name] = column.to_numpy()
    return columns

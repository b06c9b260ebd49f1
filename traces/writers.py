"""Write a trace: Mooncake JSON lines and our own, which real servers and this project replay, and Azure's CSV.

A file appears whole or not at all. What a format cannot hold is returned in words, never dropped in silence. Knows
nothing of how traces are read; `jsonl` and `delimited` say what the fields mean.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from traces.jsonl import BLOCK_TOKENS, HEADER_KEY, HEADER_VALUE
from traces.request import MAX_IMAGES, NO_ADAPTER, TASKS, Adapter, Trace, TraceError
from traces.suggest import near

FORMATS = ("mooncake", "ours", "azure")
_LINES_AT_ONCE = 10_000


def write_trace(trace: Trace, path: str | Path, format: str = "ours") -> tuple[str, ...]:
    """Write `trace` to `path` (gzip when the name ends in .gz) and return sentences on what `format` could not hold.

    ours: every field, exactly. mooncake: arrivals in ms (with decimals where needed), tokens, hash_ids, adapter and
    rank, num_images. azure: stamps from settings["first_stamp_ns"] (else 1970), tokens, and the squares of image counts
    where any request has images. Raises TraceError; a file already there is replaced only by a complete one.
    """
    writers = {"mooncake": _mooncake, "ours": _ours, "azure": _azure}
    if format not in writers:
        raise TraceError(f"cannot write format {format!r}{near(format, FORMATS)}; one of {', '.join(FORMATS)}")
    lost, lines = writers[format](trace)
    _write_whole(Path(path), lines)
    return tuple(lost)


def _write_whole(path: Path, lines: Iterator[str]) -> None:
    """Write to a file beside it, flush it to the disk, and rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as stored:
            # No name and no time in the gzip header: the same trace gives the same bytes.
            out = gzip.GzipFile("", "wb", 6, stored, mtime=0) if path.suffix == ".gz" else stored
            while block := list(islice(lines, _LINES_AT_ONCE)):
                out.write("".join(block).encode("utf-8"))
            if out is not stored:
                out.close()
            stored.flush()
            os.fsync(stored.fileno())
        os.replace(part, path)
    except OSError as error:
        raise TraceError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def _lists(trace: Trace) -> tuple[list, ...]:
    columns = (trace.arrival_ns, trace.prompt_tokens, trace.output_tokens, trace.images, trace.adapter)
    return tuple(column.tolist() for column in columns)


def _mooncake(trace: Trace) -> tuple[list[str], Iterator[str]]:
    lost = [f"Mooncake rows hold no {what}" for what in _beyond_mooncake(trace)]
    ids: list[list[int]] | None = None
    if trace.prefix is not None:
        if all(_is_blocks(prefix, n) for prefix, n in zip(trace.prefix, trace.prompt_tokens.tolist(), strict=True)):
            ids = [[key for key, _ in prefix] for prefix in trace.prefix]
        else:
            ids = _reblocked(trace)
            lost.append(f"prefixes are cut anew into blocks of {BLOCK_TOKENS} tokens; part of a block is not shared")
    names = [f', "adapter": {json.dumps(a.name)}, "rank": {a.rank}' for a in trace.adapters]

    def lines():
        columns = [*_lists(trace), [None] * len(trace) if ids is None else ids]
        for arrival, prompt, output, images, adapter, blocks in zip(*columns, strict=True):
            row = f'{{"timestamp": {_milliseconds(arrival)}, "input_length": {prompt}, "output_length": {output}'
            row += f', "hash_ids": {blocks}' if blocks is not None else ""
            row += names[adapter] if adapter != NO_ADAPTER else ""
            row += f', "num_images": {images}' if images else ""
            yield row + "}\n"

    return lost, lines()


def _milliseconds(ns: int) -> str:
    whole, rest = divmod(ns, 1_000_000)
    return f"{whole}.{rest:06d}".rstrip("0") if rest else str(whole)


def _beyond_mooncake(trace: Trace) -> list[str]:
    beyond = []
    if trace.task.any():
        beyond.append("tasks")
    if trace.head.any():
        beyond.append("task heads (those requests decode one token)")
    if any(getattr(trace, name) is not None and getattr(trace, name).any() for name in trace.OPTIONAL):
        beyond.append("SLOs")
    if any(a.digest != Adapter(a.name, a.rank).digest for a in trace.adapters):
        beyond.append("adapter digests")
    if {*range(len(trace.adapters))} - {*trace.adapter.tolist()}:
        beyond.append("adapters that no request asks for")
    return beyond


def _is_blocks(prefix: tuple[tuple[int, int], ...], prompt_tokens: int) -> bool:
    """Whether the segments are what hash_ids say: 512 tokens each, the last one perhaps cut by the prompt's end."""
    if not prefix:
        return True
    *full, (_, last) = prefix
    cut_by_end = len(full) * BLOCK_TOKENS + last == prompt_tokens and last < BLOCK_TOKENS
    return all(tokens == BLOCK_TOKENS for _, tokens in full) and (last == BLOCK_TOKENS or cut_by_end)


def _reblocked(trace: Trace) -> list[list[int]]:
    """hash_ids for any prefixes: a block of 512 tokens gets the id of all that leads up to its end."""
    known: dict[tuple, int] = {}
    ids, fresh = [], 0
    for prefix, prompt_tokens in zip(trace.prefix, trace.prompt_tokens.tolist(), strict=True):
        row, before, pieces, room = [], -1, [], BLOCK_TOKENS
        for key, tokens in prefix:
            offset = 0
            while offset < tokens:
                step = min(room, tokens - offset)
                pieces.append((key, offset, step))
                offset, room = offset + step, room - step
                if room == 0:
                    block = (before, *pieces)
                    if block not in known:
                        known[block], fresh = fresh, fresh + 1
                    before, pieces, room = known[block], [], BLOCK_TOKENS
                    row.append(before)
        own = math.ceil(prompt_tokens / BLOCK_TOKENS) - len(row)
        row += range(fresh, fresh + own)  # what follows the shared prefix is this request's alone
        fresh += own
        ids.append(row)
    return ids


def _ours(trace: Trace) -> tuple[list[str], Iterator[str]]:
    table = [{"name": a.name, "rank": a.rank, "digest": a.digest} for a in trace.adapters]
    origin = {"source": trace.source, "sha256": trace.sha256, "format": trace.format}
    header = {HEADER_KEY: HEADER_VALUE, "adapters": table, "notes": list(trace.notes), "origin": origin}
    names = [json.dumps(a.name) for a in trace.adapters]

    optional = [getattr(trace, name) for name in trace.OPTIONAL]

    def lines():
        yield json.dumps(header, ensure_ascii=False) + "\n"
        columns = [*_lists(trace), trace.task.tolist(), trace.head.tolist()]
        columns += [[None] * len(trace) if column is None else column.tolist() for column in optional]
        columns.append([None] * len(trace) if trace.prefix is None else trace.prefix)
        for arrival, prompt, output, images, adapter, task, head, ttft, tpot, prefix in zip(*columns, strict=True):
            row = f'{{"arrival_ns": {arrival}, "prompt_tokens": {prompt}, "output_tokens": {output}'
            row += f', "images": {images}' if images else ""
            row += f', "adapter": {names[adapter]}' if adapter != NO_ADAPTER else ""
            row += f', "task": "{TASKS[task]}"' if task else ""
            row += ', "head": true' if head else ""
            row += f', "prefix": {json.dumps(prefix)}' if prefix is not None else ""
            row += f', "ttft_slo_ns": {ttft}' if ttft is not None else ""
            row += f', "tpot_slo_ns": {tpot}' if tpot is not None else ""
            yield row + "}\n"

    return [], lines()


def _azure(trace: Trace) -> tuple[list[str], Iterator[str]]:
    images = bool(trace.images.any())
    most = math.isqrt(MAX_IMAGES)
    if images and trace.images.max() > most:
        raise TraceError(f"{trace.source}: Azure's column holds squares, of at most {most} images; cap them first")
    lost = [f"Azure's columns hold no {what}" for what in _beyond_mooncake(trace)]
    lost += ["Azure's columns hold no adapters"] * bool((trace.adapter != NO_ADAPTER).any())
    lost += ["Azure's columns hold no prefixes"] * (trace.prefix is not None)
    unit_ns, end = (1_000_000, 23) if images else (100, 27)
    stamps = trace.arrival_ns + trace.settings.get("first_stamp_ns", 0)
    if (stamps % unit_ns).any():
        lost.append(f"stamps are cut to {unit_ns} ns")

    def lines():
        texts = np.datetime_as_string(stamps.astype("datetime64[ns]")).tolist()
        columns = (trace.images**2, trace.prompt_tokens, trace.output_tokens)
        rows = zip(texts, *(column.tolist() for column in columns), strict=True)
        if images:
            yield "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n"
            yield from (f"{text[:end]}Z,{squares},{prompt},{output}\n" for text, squares, prompt, output in rows)
        else:
            yield "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            yield from (f"{text[:10]} {text[11:end]},{prompt},{output}\n" for text, _, prompt, output in rows)

    return lost, lines()

"""The packed batch of one step on the host: decodes first, one row each, then the chunks of prompts, as int32 arrays.

The same batch is launched kernel by kernel, its arrays sent as they are, or through a CUDA graph, padded to its bucket. It
knows rows, pages and positions, and computes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine.models import ModelShape
from engine.sequence import Decodes, Sequence


@dataclass
class Packed:
    """T rows, the first `decodes` of them decodes. All arrays int32.

    ids [T]: 0 for decodes, whose tokens lie on the device in rows [decodes] of the last tokens. positions [3 or 1, T].
    slots [T]: where keys go. adapters [T]. lengths [decodes]: keys of each, the new one included. tables [requests, width].
    chunks: (tokens, context before them). outputs: whose next token comes, out_rows: the row it is read from. image_rows:
    rows that are image tokens, taken from (features, rows of them). heads: (sequence, first row, end) of head tasks.
    """

    decodes: int
    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    adapters: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    tables: np.ndarray
    chunks: list[tuple[int, int]]
    outputs: list[Sequence]
    out_rows: np.ndarray
    image_rows: np.ndarray
    features: list[tuple[torch.Tensor, np.ndarray]] = field(default_factory=list)
    heads: list[tuple[Sequence, int, int]] = field(default_factory=list)

    @property
    def out_slots(self) -> np.ndarray:
        """Rows of the last tokens that the outputs go to."""
        return np.array([sequence.row for sequence in self.outputs], np.int32)


def packed(decodes: Decodes, chunks: list[tuple[Sequence, int]], shape: ModelShape, page: int) -> Packed:
    """The next step of `decodes` beside the next tokens of the chunks' sequences, whose pages have been found."""
    n = len(decodes.sequences)
    positions, slots, lengths = decodes.step()
    ids, slot_parts, adapters = [np.zeros(n, np.int32)], [slots], [decodes.adapters]
    position_parts = [np.broadcast_to(positions, (3 if shape.mrope else 1, n))]
    tables = np.zeros((n + len(chunks), decodes.tables.shape[1]), np.int32)
    tables[:n] = decodes.tables
    outputs, output_rows, image_rows = list(decodes.sequences), list(range(n)), [np.empty(0, np.int32)]
    features, heads, total = [], [], n
    for number, (sequence, tokens) in enumerate(chunks, n):
        start, stop = sequence.kv, sequence.kv + tokens
        ids.append(sequence.ids_at(start, stop))
        position_parts.append(sequence.positions_at(start, stop))
        tables[number, : len(sequence.table.pages)] = sequence.table.pages
        at = np.arange(start, stop)
        slot_parts.append(tables[number, at // page] * page + at % page)
        adapters.append(np.full(tokens, sequence.adapter, np.int32))
        if sequence.features is not None:
            offsets, rows = sequence.image_rows(start, stop, shape)
            if len(rows):
                image_rows.append(offsets + total)
                features.append((sequence.features, rows))
        if sequence.head is not None:
            heads.append((sequence, total, total + tokens))
        elif stop == sequence.target:
            outputs.append(sequence)
            output_rows.append(total + tokens - 1)
        total += tokens
    return Packed(
        n, np.concatenate(ids), np.concatenate(position_parts, axis=1), np.concatenate(slot_parts), np.concatenate(adapters),
        decodes.rows, lengths, tables, [(tokens, sequence.kv) for sequence, tokens in chunks], outputs,
        np.array(output_rows, np.int32), np.concatenate(image_rows), features, heads,
    )  # fmt: skip

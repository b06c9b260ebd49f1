"""The start of a joint training: the adapters and heads of several runs as one adapter and one head, without a step.

The sum of the runs' weight updates, cut to the adapter's rank where that loses least (Eckart and Young 1936), in float32 on
the CPU. Summing updates is task arithmetic (Ilharco et al. 2023). What a merged adapter holds is for others to find out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.fusion.task_heads import NAMES_FILE, Head
from engine.heads import FILE

A, B = ".lora_A.", ".lora_B."


def merged_factors(adapters: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Factors A [r, in] and B [out, r] by name whose product is nearest to the sum of the adapters' products.

    adapters: of one shape and scale, by PEFT's names. A single one is returned as it is.
    """
    if len(adapters) == 1:
        return dict(adapters[0])
    found = {}
    for name in (name for name in adapters[0] if A in name):
        other = name.replace(A, B)
        rank = adapters[0][name].shape[0]
        down = torch.cat([weights[name].float() for weights in adapters])
        up = torch.cat([weights[other].float() for weights in adapters], 1)
        left, upper = torch.linalg.qr(up)  # the sum has at most as many dimensions as all ranks together: a small SVD
        right, lower = torch.linalg.qr(down.T)
        u, strength, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        root = strength[:rank].sqrt()
        found[other] = _padded(left @ (u[:, :rank] * root), rank)
        found[name] = _padded(right @ (v[: len(root)].T * root), rank).T.contiguous()
    return found


def _padded(columns: torch.Tensor, rank: int) -> torch.Tensor:
    """`columns` [n, at most rank] with zeros up to `rank`: a layer may be narrower than the adapter."""
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))


def merge_heads(head: Head, adapters: Sequence[Path]) -> None:
    """Into `head` the rows of the heads in these adapter folders, and the mean of their boxes."""
    boxes: dict[str, list[torch.Tensor]] = {}
    for folder in adapters:
        if (folder / FILE).exists():
            tensors = load_file(folder / FILE)
            head.copy_rows(json.loads((folder / NAMES_FILE).read_text(encoding="utf-8"))["rows"], tensors)
            for name in (name for name in tensors if name.startswith("boxes.")):
                boxes.setdefault(name, []).append(tensors[name])
    if boxes:
        head.copy_rows((), {name: torch.stack(found).mean(0) for name, found in boxes.items()})

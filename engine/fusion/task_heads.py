"""Vision task heads in training: classes from the last hidden state, boxes from the query positions, in the engine's format.

An adapter has one head for all of its domains whose answers are bounded: a row a label (`domain/label`), and, where a domain
answers boxes, a row for "no object" and a linear box. What the engine reads is `vision_head.safetensors` (`engine.heads`);
`vision_head.json` beside it says what the rows mean. The loss over boxes is DETR's (Carion et al. 2020): Hungarian matching,
then cross-entropy, L1, and generalised IoU (Rezatofighi et al. 2019).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from engine.fusion.domains import Domain
from engine.fusion.metrics import Box
from engine.fusion.wording import QUERIES
from engine.fusion.workbench import NO_OBJECT
from engine.heads import FILE
from traces.whole_file import replace_text

NAMES_FILE = "vision_head.json"
L1_WEIGHT, GIOU_WEIGHT = 5.0, 2.0
NO_OBJECT_WEIGHT = 0.5
"""DETR's tenth is for a hundred queries; with eight it leaves too many boxes standing."""


class Head(nn.Module):
    """rows: what each class row means, `domain/label`, "no object" last where there are boxes. Float32 parameters."""

    def __init__(self, domains: Sequence[Domain], hidden: int, seed: int):
        super().__init__()
        self.rows = rows_of(domains)
        self.boxed = any(domain.head and domain.boxed for domain in domains)
        generator = torch.Generator().manual_seed(seed)

        def drawn(count: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(count, hidden, generator=generator) * 0.1 * hidden**-0.5)

        self.classes, self.classes_bias = drawn(len(self.rows)), nn.Parameter(torch.zeros(len(self.rows)))
        if self.boxed:
            self.boxes, self.boxes_bias = drawn(4), nn.Parameter(torch.zeros(4))

    def copy_rows(self, rows: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over what another head, with its `rows`, knows: the rows that both have, and its boxes."""
        with torch.no_grad():
            for number, row in enumerate(self.rows):
                if row in rows:
                    self.classes[number] = tensors["classes.weight"][rows.index(row)]
                    self.classes_bias[number] = tensors["classes.bias"][rows.index(row)]
            if self.boxed and "boxes.weight" in tensors:
                self.boxes.copy_(tensors["boxes.weight"])
                self.boxes_bias.copy_(tensors["boxes.bias"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The head in the engine's format."""
        found = {"classes.weight": self.classes.detach(), "classes.bias": self.classes_bias.detach()}
        if self.boxed:
            found |= {"boxes.weight": self.boxes.detach(), "boxes.bias": self.boxes_bias.detach()}
            found["queries"] = torch.tensor([QUERIES])
        return {key: value.cpu().contiguous() for key, value in found.items()}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., rows] from hidden states."""
        return linear(hidden.float(), self.classes, self.classes_bias)

    def class_loss(self, last: torch.Tensor, domain: Domain, labels: Sequence[str]) -> torch.Tensor:
        """Cross-entropy over all rows of the adapter, since serving chooses among all. last [batch, hidden]."""
        targets = torch.tensor([self.rows.index(f"{domain.name}/{label}") for label in labels], device=last.device)
        return cross_entropy(self.logits(last), targets)

    def box_loss(self, hidden: torch.Tensor, domain: Domain, wanted: Sequence[Sequence[Box]]) -> torch.Tensor:
        """DETR's loss. hidden [batch, queries, hidden]; at most as many boxes as queries are matched (with `refer` none)."""
        logits, boxes = self.logits(hidden), corners_of(linear(hidden.float(), self.boxes, self.boxes_bias).sigmoid())
        kinds, corners, counts = self._targets(domain, wanted)
        if domain.task == "refer":  # always one box: the last position answers it, nothing competes
            place = torch.arange(len(counts), device=hidden.device)
            pairs = place, torch.full_like(place, QUERIES - 1), kinds.to(hidden.device), corners.to(hidden.device)
        else:
            pairs = match(logits, boxes, kinds, corners, counts)
        targets = torch.full(logits.shape[:2], len(self.rows) - 1, device=hidden.device)
        weight = torch.ones(len(self.rows), device=hidden.device)
        weight[-1] = NO_OBJECT_WEIGHT
        images, queries, kinds, corners = pairs
        targets[images, queries] = kinds
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), weight)
        if len(kinds):
            found = boxes[images, queries]
            loss = loss + L1_WEIGHT * (found - corners).abs().sum(-1).mean() / 4
            loss = loss + GIOU_WEIGHT * (1 - giou(found, corners)).mean()
        return loss

    def _targets(self, domain: Domain, wanted: Sequence[Sequence[Box]]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Of all images' boxes in turn: rows int64 [n], corners [n, 4]; and how many each image has. On the CPU."""
        kept = [boxes[:QUERIES] for boxes in wanted]
        rows = [self.rows.index(f"{domain.name}/{box.label}") for boxes in kept for box in boxes]
        corners = torch.tensor([box[1:5] for boxes in kept for box in boxes], dtype=torch.float32).view(-1, 4)
        return torch.tensor(rows, dtype=torch.int64), corners, [len(boxes) for boxes in kept]

    @torch.no_grad()
    def labels(self, last: torch.Tensor, domain: Domain) -> list[str]:
        """The label of each [batch, hidden]; a row of another domain is named in full, and so never right."""
        best = [self.rows[i] for i in self.logits(last).argmax(-1).tolist()]
        return [row.removeprefix(f"{domain.name}/") for row in best]

    @torch.no_grad()
    def found(self, hidden: torch.Tensor, domain: Domain) -> list[list[Box]]:
        """The boxes of each image, as the engine answers them: the best row of each query, if it is one of the domain's."""
        chances, boxes = self.logits(hidden).softmax(-1), linear(hidden.float(), self.boxes, self.boxes_bias).sigmoid()
        scores, kinds = (t.tolist() for t in chances.max(-1))
        result = []
        for scored, named, corners in zip(scores, kinds, corners_of(boxes).tolist(), strict=True):
            rows = [self.rows[kind] for kind in named]
            boxes_here = [
                Box(row.removeprefix(f"{domain.name}/"), *box, score)
                for row, box, score in zip(rows, corners, scored, strict=True) if row.startswith(f"{domain.name}/")
            ]  # fmt: skip
            result.append(sorted(boxes_here, key=lambda box: -box.score))
        return result


def rows_of(domains: Sequence[Domain]) -> tuple[str, ...]:
    """The class rows of a head for these domains, in their order."""
    headed = [domain for domain in domains if domain.head]
    rows = [f"{domain.name}/{label}" for domain in headed for label in domain.labels]
    return (*rows, NO_OBJECT) if any(domain.boxed for domain in headed) else tuple(rows)


def corners_of(boxes: torch.Tensor) -> torch.Tensor:
    """Corners [..., 4] of boxes given as centre x, y, width, height."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of corners [..., 4], broadcast: IoU less the share of the hull that neither covers."""
    def area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return (high - low).clamp(min=0).prod(-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    either = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    hull = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return both / either.clamp(min=1e-9) - (hull - either) / hull.clamp(min=1e-9)


@torch.no_grad()
def match(logits: torch.Tensor, boxes: torch.Tensor, kinds: torch.Tensor, corners: torch.Tensor, counts: Sequence[int]):
    """Hungarian matching of queries to boxes: (images, queries, kinds int64 [pairs], corners [pairs, 4]), on the device.

    logits [batch, queries, rows], boxes [batch, queries, 4] corners; of the targets of all images in turn kinds [n] and
    corners [n, 4], and how many each image has.
    """
    from scipy.optimize import linear_sum_assignment

    kinds, corners = kinds.to(boxes.device), corners.to(boxes.device)
    chances = logits.softmax(-1)[:, :, kinds]  # against the boxes of all images: one transfer to the host
    distance = (boxes[:, :, None] - corners).abs().sum(-1)
    cost = (L1_WEIGHT * distance - chances - GIOU_WEIGHT * giou(boxes[:, :, None], corners)).cpu().numpy()
    pairs, start = [], 0
    for image, count in enumerate(counts):
        rows, columns = linear_sum_assignment(cost[image, :, start : start + count])
        pairs += [(image, query, target + start) for query, target in zip(rows, columns, strict=True)]
        start += count
    images, queries, which = torch.tensor(pairs, dtype=torch.int64).view(-1, 3).T.to(boxes.device)
    return images, queries, kinds[which], corners[which]


def write_head(folder: Path, head: Head, domains: Sequence[Domain], query_ids: Sequence[int]) -> None:
    """Put the head into an adapter's folder: the engine's tensors, and what the rows mean."""
    from safetensors.torch import save_file

    save_file(head.tensors(), folder / FILE, {"format": "pt"})
    told = {"rows": list(head.rows), "query_ids": list(query_ids) if head.boxed else [],
            "domains": {d.name: {"task": d.task, "boxes": d.boxed} for d in domains if d.head}}  # fmt: skip
    replace_text(folder / NAMES_FILE, json.dumps(told, indent=1) + "\n")

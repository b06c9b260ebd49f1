"""What stands around the images: the prompt of each model family, answers as tokens, and both as padded batches.

A prompt is lead, images, tail, token for token what `engine.generate` makes of the same question; the lead and the images
come first in every prompt, so a batch is image features with padding on the right only, which causal attention never sees.
It knows ids and text, not what a domain is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from engine.fusion.metrics import Box
from engine.generate import formed

QUERIES = 8
"""Positions appended for a box head, each of which may answer one box."""
BOXES = re.compile(r"([^\[\];]*)\[\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\]")
NOTHING = "nothing"


class Packed(NamedTuple):
    """ids int64 [batch, longest]: tail and answer, padded right. rows, columns, targets int64 [answer tokens of all]: the
    position (in `ids`) before each answer token, and that token. last int64 [batch]: the tail's last position."""

    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    last: torch.Tensor


class Wording:
    """The prompts of one model. family: of `engine.generate.FORMS`. image_token_id: the query ids lie before it. ModelError
    for a tokenizer without it."""

    def __init__(self, family: str, tokenizer, image_token_id: int):
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self._family, self._image = family, image_token_id
        ids = self._formed("", 2)
        first, second = (number for number, token in enumerate(ids) if token == image_token_id)
        self.lead, self.between = ids[:first], ids[first + 1 : second]
        end = min([i for i in tokenizer.all_special_ids if i > 1000] + [image_token_id])
        self.query_ids = list(range(end - QUERIES, end))
        self._fixed: dict[tuple[int, torch.device], torch.Tensor] = {}

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []

    def _formed(self, question: str, images: int) -> list[int]:
        return formed(question, images, self._family, self._image, self.tokenizer)

    def tail(self, question: str, queries: bool = False) -> list[int]:
        """Ids after the images; with `queries` the positions that a box head reads."""
        ids = self._formed(question, 1)
        return ids[ids.index(self._image) + 1 :] + (self.query_ids if queries else [])

    def answer(self, text: str) -> list[int]:
        """Ids of an answer with its end."""
        return [*self._ids(text), self.eos]

    def text(self, ids: list[int]) -> str:
        """The text of generated ids up to their end."""
        cut = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(cut, skip_special_tokens=True).strip()

    def words(self, frames: int, ids: torch.Tensor) -> torch.Tensor:
        """All ids of a prompt but the images': the lead, what stands between images, then `ids` [batch, tail and more]."""
        fixed = self.lead + self.between * (frames - 1)
        key = (frames, ids.device)
        if key not in self._fixed:
            self._fixed[key] = torch.tensor(fixed, dtype=torch.int64, device=ids.device)
        return torch.cat([self._fixed[key].expand(len(ids), -1), ids], 1)

    def interleave(self, words: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] from embedded `words` and features [batch, frames, image tokens, hidden]."""
        parts, start = [], 0
        for frame in range(features.shape[1]):
            end = start + len(self.between if frame else self.lead)
            parts += [words[:, start:end], features[:, frame].to(words.dtype)]
            start = end
        return torch.cat([*parts, words[:, start:]], dim=1)

    def image_starts(self, frames: int, image_tokens: int) -> tuple[int, ...]:
        """Where each image begins in a prompt."""
        return tuple(len(self.lead) + i * (image_tokens + len(self.between)) for i in range(frames))

    def pack(self, encoded: Sequence[tuple[list[int], list[int]]], length: int = 0) -> Packed:
        """(tail, answer) ids of a batch as tensors on the CPU, at least `length` long. An answer may be empty."""
        longest = max(length, *(len(tail) + len(answer) for tail, answer in encoded))
        ids = torch.full((len(encoded), longest), self.eos)
        rows, columns, targets = [], [], []
        for row, (tail, answer) in enumerate(encoded):
            ids[row, : len(tail) + len(answer)] = torch.tensor(tail + answer)
            rows += [row] * len(answer)
            columns += range(len(tail) - 1, len(tail) + len(answer) - 1)
            targets += answer
        last = torch.tensor([len(tail) - 1 for tail, _ in encoded])
        return Packed(ids, *(torch.tensor(v, dtype=torch.int64) for v in (rows, columns, targets)), last)


def boxes_text(boxes: tuple[Box, ...], named: bool) -> str:
    """Boxes as an adapter without a head says them: `car [12, 30, 44, 51] ; ...` in hundredths of the image."""
    def corners(box: Box) -> str:
        return ", ".join(str(min(99, max(0, round(100 * v)))) for v in box[1:5])

    return " ; ".join(f"{box.label + ' ' if named else ''}[{corners(box)}]" for box in boxes) or NOTHING


def boxes_from(text: str) -> list[Box]:
    """The boxes that a text names; what is no box is passed over."""
    found = []
    for match in BOXES.finditer(text):
        x1, y1, x2, y2 = (int(v) / 100 for v in match.groups()[1:])
        if x2 > x1 and y2 > y1:
            found.append(Box(match[1].strip() or "object", x1, y1, x2, y2))
    return found

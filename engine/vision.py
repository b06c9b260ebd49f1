"""CUDA graphs of the vision tower: its few hundred small kernels cost the host more time than the GPU.

A batch of images is padded to a bucket or, beyond the largest, goes in pieces. LLaVA's tower is transformers' own,
Qwen2-VL's is ours (`engine.qwen_vision`). It knows pixels and features, not whose they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from engine.graphs import leave_capture, recorded
from engine.models import Model
from engine.qwen_vision import QwenVision

BUCKETS = (1, 2, 4, 8, 16)


class VisionGraphs:
    """`encode` gives what `Model.encode_images` does, all images in one pass, by graphs once `capture` was called."""

    def __init__(self, model: Model):
        self._model = model
        self._tower = QwenVision(model) if model.shape.family == "qwen2_vl" else model.encode_images
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]] = {}
        self._pool = None

    def capture(self) -> None:
        """Record all buckets, the largest first; none, with a word on stderr, for a tower that a graph cannot hold."""
        if self._graphs:
            return
        device = self._model.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        try:
            for bucket in reversed(BUCKETS):
                self._graphs[bucket] = self._capture(bucket)
        except RuntimeError as error:  # another version of the tower may ask the host for something
            self._graphs.clear()
            if stream is not None:
                leave_capture(stream, device)
            print(f"vision tower: no graphs, launched kernel by kernel: {error}", file=sys.stderr)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[images, image_tokens, hidden], the caller's to keep."""
        if not self._graphs:
            return self._tower(pixels)
        parts = []
        for piece in pixels.split(BUCKETS[-1]):
            bucket = next(size for size in BUCKETS if size >= len(piece))
            graph, source, features = self._graphs[bucket]
            source[: len(piece)].copy_(piece)
            graph.replay()
            parts.append(features[: len(piece)].clone())
        return torch.cat(parts)

    @torch.inference_mode()
    def _capture(self, bucket: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor, torch.Tensor]:
        model, shape = self._model, self._model.shape
        place = {"dtype": model.dtype, "device": model.device}
        source = torch.zeros(bucket, *shape.pixels, **place)
        self._tower(source[:1])  # what it finds out once, it must know before
        features = torch.zeros(bucket, shape.image_tokens, shape.hidden, **place)
        return self._record(lambda: features.copy_(self._tower(source))), source, features

    def _record(self, step: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph = recorded(step, self._pool)
        self._pool = self._pool or graph.pool()
        return graph

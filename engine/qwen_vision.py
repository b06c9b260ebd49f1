"""Qwen2-VL's vision tower over a batch of images, on the weights of a transformers model.

transformers packs the patches of all images into one sequence and then attends image by image, asking the host for their
lengths in every layer. All images here have one size, so attention is one call a layer, nothing is asked, and a CUDA
graph can hold the pass. It knows pixels and features, not whose they are.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.models import Model


class QwenVision:
    """The tower of `model`, called as `Model.encode_images`."""

    def __init__(self, model: Model):
        self._model = model
        self._visual = model.hf.model.visual
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """[images, image_tokens, hidden] of pixels [images, patches, patch values]."""
        visual, images = self._visual, len(pixels)
        if self._angles is None:
            self._angles = self._find_angles(pixels[:1])
        # Patches do not overlap: the convolution is a product, which no version of cuDNN makes slow.
        hidden = nn.functional.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
        for block in visual.blocks:
            hidden = hidden + self._attention(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
        return visual.merger(hidden.flatten(0, 1)).view(images, self._model.shape.image_tokens, -1)

    def _attention(self, attention: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        images, patches, width = hidden.shape
        qkv = attention.qkv(hidden).view(images, patches, 3, attention.num_heads, -1)
        query, key = self._turned(qkv[:, :, 0]), self._turned(qkv[:, :, 1])
        context = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)
        )
        return attention.proj(context.transpose(1, 2).reshape(images, patches, width))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions of rows and columns, in float32 as transformers does it. x [images, patches, heads, size]."""
        cos, sin = self._angles
        wide = x.float()
        left, right = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)

    def _find_angles(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [patches, 1, head size] of an image's patches, as transformers hands them to its first block."""
        seen = []
        hook = self._visual.blocks[0].register_forward_pre_hook(
            lambda _, __, options: seen.append(options["position_embeddings"]), with_kwargs=True
        )
        try:
            self._model.encode_images(pixels)
        finally:
            hook.remove()
        cos, sin = (part.float().unsqueeze(-2) for part in seen[0])
        return cos, sin

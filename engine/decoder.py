"""The language model's forward pass over one packed step, on the weights of a transformers model.

q, k, v and gate, up are fused into one matrix each; the model's own parameters become views of them, so that transformers'
forward stays valid (it is the truth in the tests) and folding an adapter in reaches both. Ours instead of transformers'
layers because a step then takes a dozen kernels a layer, not fifty, and the LoRA branch of q, k, v is one call.
It knows a layer and its projections, not which adapter or page a row belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn

from engine.attention import Layout, attend
from engine.models import Model, ModelShape
from engine.positions import Rotary
from kernels.batch import Key, Projection
from kernels.pointwise import add_rms_norm, rope_store, silu_mul
from kernels.skinny import gated, linear

ATTENTION = ("qkv", "o")
ALL_LINEAR = ("qkv", "o", "gate_up", "down")
SLICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",),
}  # fmt: skip
"""Projection -> the modules of a layer that it holds, in the order of its slices."""


def projections_of(shape: ModelShape, names: tuple[str, ...] = ALL_LINEAR) -> dict[str, Projection]:
    """The sizes of the named projections."""
    kv = shape.kv_heads * shape.head_dim
    query = shape.heads * shape.head_dim
    sizes = {
        "qkv": Projection(shape.hidden, (query, kv, kv)), "o": Projection(query, (shape.hidden,)),
        "gate_up": Projection(shape.hidden, (shape.intermediate,) * 2),
        "down": Projection(shape.intermediate, (shape.hidden,)),
    }  # fmt: skip
    return {name: sizes[name] for name in names}


@dataclass(frozen=True)
class Branch:
    """The LoRA branches of a step. add: those of a projection, (y, x, key), y in place. names: projections that have any.
    joined: (x, weight, bias, key) -> y, linear and branches in one, where an operator knows a better way than in turn."""

    add: Callable[[torch.Tensor, torch.Tensor, Key], None] | None = None
    names: Collection[str] = ()
    joined: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Key], torch.Tensor] | None = None

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key: Key) -> torch.Tensor:
        """A projection of x [T, d_in] with its branches, [T, d_out]."""
        if key[1] not in self.names:
            return linear(x, weight, bias)
        if self.joined:
            return self.joined(x, weight, bias, key)
        y = linear(x, weight, bias)
        self.add(y, x, key)
        return y


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, [out, in] each."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class Decoder:
    """The decoder of `model`. Fuses the model's weights in place (once); `weight(key)` is the fused matrix."""

    def __init__(self, model: Model):
        language = model.hf.model.language_model
        self.shape = model.shape
        self.embedding = language.embed_tokens.weight
        self.final_norm = language.norm.weight
        self.head = model.hf.lm_head.weight
        self.eps = language.norm.variance_epsilon
        self.rotary = Rotary(model.shape, language.rotary_emb.inv_freq)
        self.layers = [self._fused(layer) for layer in language.layers]

    @staticmethod
    def _fused(layer: nn.Module) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qkv, bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        gate_up, _ = fuse([mlp.gate_proj, mlp.up_proj])
        return Layer(
            layer.input_layernorm.weight, qkv, bias, attention.o_proj.weight.detach(),
            layer.post_attention_layernorm.weight, gate_up, mlp.down_proj.weight.detach(),
        )  # fmt: skip

    def weight(self, key: Key) -> torch.Tensor:
        """The (fused) matrix of a projection."""
        return getattr(self.layers[key[0]], key[1])

    def embed(self, ids: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """[T, hidden] of token ids int32 [T]; written to `into` where it is given."""
        return torch.index_select(self.embedding, 0, ids, out=into)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, layout: Layout,
                keys: torch.Tensor, values: torch.Tensor, branch: Branch | None = None) -> torch.Tensor:
        """Final hidden states, normalised, [T, hidden].

        hidden [T, hidden] is overwritten. positions [3 or 1, T]. slots int32 [T]: where each row's key goes. keys, values
        [layers, pages, kv_heads, page_tokens, head_dim].
        """
        cos, sin = self.rotary(positions)
        heads = self.shape.heads
        update, branch = None, branch or Branch()
        for number, layer in enumerate(self.layers):
            normed = add_rms_norm(update, hidden, layer.input_norm, self.eps)
            qkv = branch.linear(normed, layer.qkv, layer.qkv_bias, (number, "qkv"))
            rope_store(qkv, cos, sin, keys[number], values[number], slots, heads)
            context = attend(qkv, keys[number], values[number], heads, layout)
            update = branch.linear(context, layer.o, None, (number, "o"))
            normed = add_rms_norm(update, hidden, layer.post_norm, self.eps)
            if "gate_up" in branch.names:  # what is added comes between the linear and the gate
                inner = silu_mul(branch.linear(normed, layer.gate_up, None, (number, "gate_up")))
            else:
                inner = gated(normed, layer.gate_up)
            update = branch.linear(inner, layer.down, None, (number, "down"))
        return add_rms_norm(update, hidden, self.final_norm, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab] of final hidden states."""
        return linear(hidden, self.head)


def fuse(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight (and bias) for linears of one input; theirs become views of it. A model already fused is left as it is."""
    rows = [layer.weight.shape[0] for layer in linears]
    weight = _joined([layer.weight for layer in linears])
    bias = _joined([layer.bias for layer in linears]) if linears[0].bias is not None else None
    for layer, part in zip(linears, weight.split(rows), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    if bias is not None:
        for layer, part in zip(linears, bias.split(rows), strict=True):
            layer.bias = nn.Parameter(part, requires_grad=False)
    return weight, bias


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts in one tensor; that which they lie in already, if they lie one behind the other."""
    first = parts[0].detach()
    rows = sum(len(part) for part in parts)
    end = first.data_ptr()
    together = all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in parts)
    for part in parts:
        together = together and part.is_contiguous() and part.data_ptr() == end
        end = part.data_ptr() + part.nbytes
    if together:
        return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    return torch.cat([part.detach() for part in parts])

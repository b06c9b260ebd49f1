"""The decoder's part of a training step as CUDA graphs, one for each shape of a batch: forward and backward, a launch each.

A small model's step is some 1,500 kernels of a few microseconds, which take longer to launch than to run. Only the decoder
is captured (it never waits for the device); embeddings, heads, loss and optimizer run as they are. A graph is compared once
with what it replaces. Where one cannot be captured, or differs, the reason is said and everything further runs without.
Larger models are left alone: they are bound by their arithmetic.
It knows tensors, no domains; a graph holds as long as nobody replaces the decoder's parameters (copying into them is fine).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.graphs import leave_capture

SMALL = 1024
"""Hidden sizes below this are bound by launches."""
MOST_GRAPHS = 16
DIFFERENCE = 0.2
"""Of the norms, between a graph and plain launches: wide, because dropout may draw other masks; garbage is far beyond."""


class CausalDecoder(torch.nn.Module):
    """Last hidden states [batch, tokens, hidden] from embeddings of one shape; positions and mask are fixed."""

    def __init__(self, language: torch.nn.Module, positions: torch.Tensor):
        super().__init__()
        self.language = language
        tokens = positions.shape[-1]
        self.positions = positions
        # four dimensions: transformers takes it as it is, where it would otherwise ask the device about the positions
        self.mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=positions.device).tril()

    def forward(self, embedded: torch.Tensor) -> torch.Tensor:
        out = self.language(
            inputs_embeds=embedded, position_ids=self.positions, attention_mask=self.mask, use_cache=False
        )
        return out.last_hidden_state


class Graphs:
    """Modules by key, captured at first use on a GPU. capture False: they run as they are (on a CPU, or to compare)."""

    def __init__(self, log: Callable[[str], None], capture: bool = True):
        self._log, self._capture = log, capture
        self._kept: dict[tuple, torch.nn.Module] = {}
        self._pool = None

    def run(self, key: tuple, make: Callable[[], torch.nn.Module], *inputs: torch.Tensor):
        """`make()` of this key, applied to `inputs`, whose shapes depend on the key alone."""
        module = self._kept.get(key)
        if module is None:
            module = make()
            if len(self._kept) < MOST_GRAPHS:
                self._kept[key] = module
                if self._capture and inputs[0].is_cuda:
                    self._captured(key, module, inputs)
        return module(*inputs)

    def _captured(self, key: tuple, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Replace the module's forward by its graph, or leave it as it is. Graphs share memory: one step runs at a time."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in inputs)
        stream, device = torch.cuda.current_stream(), inputs[0].device
        try:
            with torch.random.fork_rng([device]):  # warming up draws dropout
                expected = _outcome(module, samples)
                torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True, pool=self._pool)
                _compare(expected, _outcome(module, samples))
        except (RuntimeError, AssertionError) as error:
            self._capture = False
            module.__dict__.pop("forward", None)  # that of the class again
            leave_capture(stream, device)
            self._log(f"no CUDA graph for {key}: {str(error).splitlines()[0][:160]}; steps run without")


def _outcome(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The output and the gradients of its mean square, float32 copies; dropout from one seed."""
    torch.manual_seed(0)
    found = module(*inputs)
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    gradients = torch.autograd.grad(found.float().square().mean(), wanted, allow_unused=True)
    return [found.detach().float().clone(), *(g.float().clone() for g in gradients if g is not None)]


def _compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """RuntimeError where the output, or the gradients taken together, are further apart than DIFFERENCE."""
    if len(expected) != len(found):
        raise RuntimeError(f"it has {len(found) - 1} gradients, plain launches have {len(expected) - 1}")
    for what, a, b in (("output", expected[:1], found[:1]), ("gradients", expected[1:], found[1:])):
        apart = torch.stack([(x - y).norm() for x, y in zip(a, b, strict=True)]).norm() if a else torch.zeros(())
        whole = torch.stack([x.norm() for x in a]).norm() if a else torch.zeros(())
        if not float(apart) <= DIFFERENCE * float(whole):
            raise RuntimeError(f"its {what} differ from those of plain launches by {float(apart):.3g} of {float(whole):.3g}")

"""What a user would pick without this engine: transformers with PEFT's mixed batch (`adapter_names`), one decode step timed.

Text only and every request of one length, which is kind to it: PEFT refuses a packed batch, and a batch with images. The
model's layers are wrapped for good, so this comes last. It knows no paging and no graphs; that is the point.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from engine.models import Model

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


def peft_step_us(model: Model, *, requests: int, context: int, adapters: int, rank: int, repeats: int) -> float:
    """Median microseconds of one decode step of `requests` requests over `adapters` adapters, `context` tokens each."""
    from peft import LoraConfig, get_peft_model

    def config() -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False)

    wrapped = get_peft_model(model.hf, config(), adapter_name="a0", autocast_adapter_dtype=False)
    for number in range(1, adapters):
        wrapped.add_adapter(f"a{number}", config())
    wrapped.to(model.dtype).eval()
    names = [f"a{i % adapters}" for i in range(requests)]
    ids = torch.full((requests, context), 7, device=model.device)
    took = []
    with torch.inference_mode():
        # one forward pass fills the cache; its LoRA branches are left out of it, since only the time of the steps counts
        with wrapped.disable_adapter():
            cache = wrapped(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(repeats + 2):
            _wait(model)
            began = time.perf_counter()
            step = wrapped(
                input_ids=ids[:, :1], past_key_values=cache, use_cache=True, adapter_names=names, logits_to_keep=1
            )  # fmt: skip
            step.logits.argmax(-1)
            _wait(model)
            took.append((time.perf_counter() - began) * 1e6)
            cache = step.past_key_values
    return median(took[2:])


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()

"""What a user would pick without this engine: transformers with PEFT's mixed batch (`adapter_names`), timed.

Text only and every request of one length, which is kind to it: PEFT refuses a packed batch, and a batch with images, and
unequal prompts would be padded. The model's layers are wrapped for good, so this comes last. It knows no paging and no
graphs; that is the point.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from engine.models import Model
from engine.prompts import random_text
from traces.record import STATUS, RunResult, summarize
from traces.request import Trace

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"
BASE = "__base__"
"""PEFT's name for rows without an adapter."""
UNCOUNTED = 2
"""Decode steps that warm up."""


class BaselineError(ValueError):
    """Requests that PEFT cannot serve. The message names the way out."""


@dataclass(frozen=True)
class PeftTimes:
    """Seconds of one prefill of the whole batch, and of each decode step after it."""

    prefill_s: float
    step_s: list[float]


def peft_times(model: Model, *, context: int, ranks: list[int], asked: list[int], repeats: int) -> PeftTimes:
    """A batch over adapters of `ranks`: request i has `context` tokens and adapter asked[i] (-1: none)."""
    from peft import LoraConfig, get_peft_model

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False)

    wrapped = get_peft_model(model.hf, config(ranks[0]), adapter_name="a0", autocast_adapter_dtype=False)
    for number, rank in enumerate(ranks[1:], 1):
        wrapped.add_adapter(f"a{number}", config(rank))
    wrapped.to(model.dtype).eval()
    names = [f"a{number}" if number >= 0 else BASE for number in asked]
    ids = random_text(model.shape, np.random.default_rng(0), (len(asked), context))  # as in `step_bench`
    ids = torch.from_numpy(ids).long().to(model.device)
    options = {"use_cache": True, "adapter_names": names, "logits_to_keep": 1}
    cache, took = None, []
    with torch.inference_mode():
        wrapped(input_ids=ids[:, : min(8, context)], **options)  # the first call of all loads kernels
        for number in range(1 + UNCOUNTED + repeats):
            _wait(model)
            began = time.perf_counter()
            step = wrapped(input_ids=ids[:, :1] if number else ids, past_key_values=cache, **options)
            step.logits.argmax(-1)
            _wait(model)
            took.append(time.perf_counter() - began)
            cache = step.past_key_values
    return PeftTimes(took[0], took[1 + UNCOUNTED :])


def peft_step_us(model: Model, *, requests: int, context: int, adapters: int, rank: int, repeats: int) -> float:
    """Median microseconds of one decode step of `requests` requests over `adapters` adapters, `context` tokens each."""
    asked = [number % adapters for number in range(requests)]
    times = peft_times(model, context=context, ranks=[rank] * adapters, asked=asked, repeats=repeats)
    return median(times.step_s) * 1e6


def text_only(trace: Trace) -> None:
    """BaselineError where PEFT cannot serve the trace."""
    if (trace.images > 0).any() or not trace.adapters:
        raise BaselineError("PEFT's mixed batch takes no images and needs adapters: take a text workload, and --adapters")


def full_tokens_per_s(result: RunResult) -> float:
    """Output tokens per second of a closed loop until the last request arrives, while all are in flight; a request's tokens
    count evenly from its first to its last."""
    table = result.requests
    rows = table["status"] == STATUS.index("completed")
    if not rows.any():
        return 0.0
    first_ns, finish_ns, tokens = (table[name][rows] for name in ("first_token_ns", "finish_ns", "generated_tokens"))
    until_ns = int(table["arrival_ns"].max())
    if not until_ns:  # nobody had to wait for another's end: the whole run counts
        until_ns = int(finish_ns.max())
    share = np.clip((until_ns - first_ns) / np.maximum(finish_ns - first_ns, 1), 0, 1)
    return float(np.where(first_ns <= until_ns, 1 + (tokens - 1) * share, 0).sum() / until_ns * 1e9)


def against_peft(results: list[RunResult], model: Model, trace: Trace, requests: int, repeats: int) -> None:
    """Serve the first `requests` requests by transformers and PEFT, all at the mean of their lengths; what came of it goes
    into the results' configurations and to stderr."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    first = trace.take(np.arange(min(requests, len(trace))))
    prompt, output = float(first.prompt_tokens.mean()), float(first.output_tokens.mean())
    context = max(1, round(prompt + output / 2))
    ranks = [adapter.rank for adapter in trace.adapters]
    times = peft_times(model, context=context, ranks=ranks, asked=first.adapter.tolist(), repeats=max(1, repeats))
    step_s = median(times.step_s)
    longest = int(first.output_tokens.max())
    decode = len(first) / step_s
    batch = len(first) * output / (times.prefill_s + (longest - 1) * step_s)
    facts = {
        "what": "transformers + PEFT, adapter_names, one static batch, all of the mean length", "requests": len(first),
        "adapters": len(ranks), "context_tokens": context, "mean_output_tokens": round(output, 1),
        "longest_output_tokens": longest, "decode_step_ms": round(step_s * 1e3, 2), "steps": len(times.step_s),
        "prefill_s": round(times.prefill_s, 3), "decode_tokens_per_s": round(decode, 2),
        "batch_tokens_per_s": round(batch, 2),
    }  # fmt: skip
    for result in results:
        ours, full = summarize(result)["output_throughput"] or 0.0, full_tokens_per_s(result)
        done = int((result.requests["status"] == STATUS.index("completed")).sum())
        result.config["baseline"] = facts | {
            "engine_tokens_per_s": round(ours, 2), "engine_full_tokens_per_s": round(full, 2),
            "ratio_to_decode": round(full / decode, 2), "ratio_to_batch": round(full / batch, 2),
        }  # fmt: skip
        line = (
            f"{full:,.1f} output tokens/s with all in flight, {ours:,.1f} over the whole run of {done} requests, prefills "
            f"included; transformers + PEFT: {decode:,.1f} in decode steps of {step_s * 1e3:,.1f} ms alone "
            f"({full / decode:.1f}x), {batch:,.1f} as a batch that prefills and ends with its longest request "
            f"({full / batch:.1f}x)"
        )
        result.config["notes"].append(line)
        print(f"{result.policy}: {line}", file=sys.stderr)


def _wait(model: Model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()

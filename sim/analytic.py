"""Analytic profiles of three LMMs on one H200, from a few measured constants and the models' shapes.

`python -m sim.analytic` writes them to `sim/profiles/`; a test compares the files with what this module makes. They call
themselves analytic wherever they are printed, and stand in for a model until the engine has measured it. Constants: plain
CUDA graphs of transformers' layers in bf16 (torch 2.11, random weights) on one H200, LLaVA-1.5-7B. What they leave out: host
time between steps (0 here), and anything that changes with the engine's own kernels.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

PROFILES = Path(__file__).parent / "profiles"
OPERATORS = PROFILES.parents[1] / "kernels/results/operators_h200.csv"
PEERS = OPERATORS.with_name("peers_h200.csv")

# Measured, LLaVA-1.5-7B on one H200
WEIGHTS_BYTES_PER_US = 3.05e6  # cuBLAS moves the weights of a decode step at 2.9-3.1 TB/s
SMALL_KERNELS_US = ((1, 1800.0), (32, 2600.0), (64, 2800.0))  # norms, rope, casts, KV writes in a step, by tokens
PREFILL_US = ((1024, 32_000.0), (4096, 121_000.0), (8192, 235_000.0))  # whole prefill in segments of 1,024
DECODE_ATTENTION_US = ((1, 1100.0), (8, 2400.0), (32, 6900.0), (64, 13_200.0))  # FA2, 1,000 tokens of context each
VISION_US = ((1, 9000.0), (8, 11_000.0))  # CLIP tower, eager, launch-bound up to here
MATMUL_FLOP_PER_US = 440e6  # what a plain prefill reaches
SWITCH_US = {
    "fused": ((64, 2460.0), (128, 2900.0)),  # one Triton launch for all layers, q, k, v, o
    "addmm": ((64, 4100.0),),  # addmm per layer and projection
    "peft": ((64, 36_000.0),),  # merge_adapter
}
LOAD_GB_PER_S = 55.0  # pinned host memory to the GPU
DEVICE_BYTES = 143_771 * 2**20
RESERVE_BYTES = 8 * 10**9  # activations, CUDA graphs, the runtime; an assumption

WIDTH = 4096
"""Columns in and out of a measured call."""
SHARED_TOKENS = 256
"""A call of so many rows is the same work in either phase, so prefill curves begin with the decode measurement."""
PADDED = ("vllm", "dlora", "grouped")
"""Operators that compute every adapter of a batch at its largest rank."""
FUSES_QKV = ("atmm", "atmm-static", "sglang")
"""Operators whose one call for q, k and v beats three; the others take one call a projection."""
FUSES_LIKE = {"atmm-static": "atmm"}
"""Operators without fused measurements of their own: theirs are to their single calls as the other's are."""
OURS = ("atmm", "atmm-static", "punica", "slora", "dlora", "vllm", "grouped", "loop")
RELEASED = {
    "punica_bgmv": "punica", "punica_sgmv": "punica", "slora": "slora", "slora_triton": "slora", "vllm": "vllm",
    "dlora_einsum": "dlora", "torch_gather_bmm": "dlora", "torch_grouped_mm": "grouped", "torch_loop": "loop",
    "sgl_triton_v2": "sglang", "valora_atmm_fixed": "atmm-artefact",
}  # fmt: skip
"""Operators of the peers' file by the name of the technique; the fastest variant counts."""
FLAT = ("slora_triton", "dlora_einsum")
"""Prefill operators that were measured for few numbers of adapters, on which their times depend little (1 and 8 adapters of
rank 64: 1 and 20 %). For a number between or beyond, the time for the next fewer counts, which favours the rival."""


@dataclass(frozen=True)
class Shape:
    """What a cost depends on. *_params in numbers, without embeddings; vision per image."""

    layers: int
    hidden: int
    kv_hidden: int
    decoder_params: float
    vision_params: float
    total_params: float
    vocab: int
    patches: int
    vision_layers: int
    image_tokens: int
    video_images: int
    max_context: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of all layers in 16 bit."""
        return 2 * 2 * self.layers * self.kv_hidden

    @property
    def adapter_params_per_rank(self) -> int:
        """A and B on q, k, v, o of all layers."""
        return self.layers * ((self.hidden + self.hidden) * 2 + (self.hidden + self.kv_hidden) * 2)

    @property
    def target_params(self) -> int:
        """Weights of q, k, v, o: what a switch rewrites."""
        return self.layers * (2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_hidden)


LLAVA_7B = Shape(32, 4096, 4096, 6.476e9, 0.304e9, 7.063e9, 32064, 577, 24, 576, 3, 4096)
SHAPES = {
    "llava-1.5-7b": LLAVA_7B,
    "llava-1.5-13b": Shape(40, 5120, 5120, 12.688e9, 0.304e9, 13.351e9, 32064, 577, 24, 576, 3, 4096),
    "qwen2-vl-7b": Shape(28, 3584, 512, 6.526e9, 0.676e9, 8.291e9, 152064, 1024, 32, 256, 6, 32768),
}


def _linear(shape: Shape) -> list[list[float]]:
    """Linear layers and small kernels: bound by the weights' bytes, then by the measured prefill rate."""
    scale = shape.decoder_params / LLAVA_7B.decoder_params
    small = shape.layers * shape.hidden / (LLAVA_7B.layers * LLAVA_7B.hidden)
    weights_us = shape.decoder_params * 2 / WEIGHTS_BYTES_PER_US
    points = [[tokens, weights_us + us * small] for tokens, us in SMALL_KERNELS_US]
    floor_us = points[-1][1]
    first_tokens, first_us = PREFILL_US[0]
    per_token_us = (first_us - _prefill_attention_us(LLAVA_7B, first_tokens, 0)) / first_tokens * scale
    points += [[tokens, max(floor_us, per_token_us * tokens)] for tokens in (128, 256, 512)]
    for tokens, us in PREFILL_US:
        segments = tokens // first_tokens
        points.append([tokens, (us - segments * _prefill_attention_us(LLAVA_7B, first_tokens, 0)) * scale])
    return [[tokens, round(us, 1)] for tokens, us in points]


def _prefill_attention_us(shape: Shape, tokens: int, context: int) -> float:
    """Scores and values of a causal chunk: 4 hidden (context + tokens/2) FLOP a token and layer."""
    return 4 * shape.hidden * shape.layers * tokens * (context + tokens / 2) / MATMUL_FLOP_PER_US


def _decode_attention(shape: Shape) -> dict[str, list[list[float]]]:
    """The measured time at 1,000 tokens, proportional to the context and to the KV bytes of a token."""
    scale = shape.kv_bytes_per_token / LLAVA_7B.kv_bytes_per_token
    return {
        str(batch): [[context, round(us * scale * context / 1000, 2)] for context in (0, 1000, 4000, 32_000)]
        for batch, us in DECODE_ATTENTION_US
    }


def _vision(shape: Shape) -> list[list[float]]:
    """Launch-bound as measured (by layers), then compute-bound."""
    launches = shape.vision_layers / LLAVA_7B.vision_layers
    image_us = 2 * shape.vision_params * shape.patches / MATMUL_FLOP_PER_US
    points = [[n, round(max(us * launches, n * image_us), 1)] for n, us in VISION_US]
    return [*points, [64, round(points[-1][1] + 56 * image_us, 1)]]


def operator_tables(shape: Shape) -> dict[str, dict]:
    """LoRA branch of a whole forward pass by operator, phase, rank, adapters and tokens, from times of single calls.

    A call on other widths than the measured ones is scaled by the columns it writes and reads.
    """
    calls = _calls()
    square = shape.hidden / WIDTH
    qkv = (2 * shape.hidden + shape.kv_hidden) / (3 * WIDTH)
    curves: dict[tuple, dict[int, float]] = {}
    for (operator, phase, slices, rank, adapters, tokens), us in sorted(calls.items()):
        if slices != 1:
            continue
        qkv_us = 3 * us
        if operator in FUSES_QKV:
            like = FUSES_LIKE.get(operator, operator)
            fused_us, single_us = (calls.get((like, phase, n, rank, adapters, tokens), 0.0) for n in (3, 1))
            qkv_us = us * fused_us / single_us if fused_us and single_us else qkv_us * _fusing_gain(calls, like, phase)
        forward_us = shape.layers * (qkv_us * qkv + us * square)
        curves.setdefault((operator, phase, rank, adapters), {})[tokens] = forward_us
        if phase == "decode" and tokens == SHARED_TOKENS:
            curves.setdefault((operator, "prefill", rank, adapters), {}).setdefault(tokens, forward_us)
    tables: dict[str, dict] = {}
    for (operator, phase, rank, adapters), curve in sorted(curves.items()):
        # Fewer rows never cost more: the operator could pad to what was measured faster, or use that variant.
        rows = sorted(curve, reverse=True)
        times = accumulate((curve[tokens] for tokens in rows), min)
        points = [[tokens, round(us, 1)] for tokens, us in zip(rows, times, strict=True)][::-1]
        by_rank = tables.setdefault(operator, {"pads": operator in PADDED}).setdefault(phase, {})
        by_rank.setdefault(str(rank), {})[str(adapters)] = points
    return tables


def _calls() -> dict[tuple, float]:
    """(operator, phase, slices, rank, adapters, tokens) -> us of one call, uniform segments of WIDTH columns; behind a
    linear, as calls occur, where that was measured.

    The rivals' decode calls are those of this project's implementations, measured beside ATMM in one run. Of their prefill
    only a few points were measured so; there the faster of ours and of the released operator counts, point by point; FLAT
    also where it was measured for fewer adapters only.
    """
    calls: dict[tuple, float] = {}
    flat: dict[tuple, dict[int, float]] = {}  # times of FLAT by numbers of adapters
    for path in (OPERATORS, PEERS):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(line for line in file if not line.startswith("#")):
                operator = RELEASED.get(row["operator"]) if path == PEERS else row["operator"]
                slices, tokens = int(row["slices"]), int(row["tokens"])
                measured = row["skew"] == "uniform" and int(row["d_in"]) == WIDTH and int(row["d_out"]) == slices * WIDTH
                if not measured or operator not in (*OURS, *RELEASED.values()):
                    continue
                key = (operator, row["phase"], slices, int(row["rank"]), int(row["adapters"]), tokens)
                ours = path == PEERS and row["phase"] == "decode" and operator in OURS
                if not ours:
                    calls[key] = min(calls.get(key, math.inf), float(row["behind_us"]) or float(row["us"]))
                if row["operator"] in FLAT:
                    flat.setdefault((key[0], key[1], key[2], key[3], tokens), {})[key[4]] = float(row["us"])
    for (*about, tokens), measured_at in flat.items():
        operator, _, slices, rank = about
        for adapters in {key[4] for key in calls if (key[0], *key[2:4]) == (operator, slices, rank)}:
            fewer = max((n for n in measured_at if n <= adapters), default=None)
            key = (*about, adapters, tokens)
            calls[key] = min(calls.get(key, math.inf), measured_at.get(fewer, math.inf))
    return calls


def _fusing_gain(calls: dict[tuple, float], operator: str, phase: str) -> float:
    """Mean time of a fused q, k, v call over three single ones, where both were measured."""
    ratios = [
        us / (3 * calls[operator, phase, 1, *key[3:]])
        for key, us in calls.items()
        if key[:3] == (operator, phase, 3) and (operator, phase, 1, *key[3:]) in calls
    ]
    return sum(ratios) / len(ratios)


def analytic_profile(model: str) -> dict:
    """The profile of `model` as JSON-able data."""
    shape = SHAPES[model]
    return {
        "kind": "analytic",
        "provenance": {
            "device": "NVIDIA H200 (analytic)",
            "made_by": "python -m sim.analytic",
            "from": "constants measured with plain CUDA graphs of transformers' layers on one H200, torch 2.11.0+cu130; "
            f"LoRA operators as in kernels/results/{OPERATORS.name} and {PEERS.name}",
        },
        "model": model,
        "max_context": shape.max_context,
        "image_tokens": shape.image_tokens,
        "video_images": shape.video_images,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "adapter_bytes_per_rank": 2 * shape.adapter_params_per_rank,
        "weights_bytes": round(2 * shape.total_params),
        "golden_bytes": 2 * shape.target_params,
        "device_bytes": DEVICE_BYTES,
        "reserve_bytes": RESERVE_BYTES,
        "linear": _linear(shape),
        "decode_attention": _decode_attention(shape),
        "prefill_attention": {
            str(context): [[t, round(_prefill_attention_us(shape, t, context), 2)] for t in (1, 256, 1024, 4096, 8192)]
            for context in (0, 1024, 4096, 32_768)
        },
        "vision": _vision(shape),
        "output": [[1, round(2 * shape.vocab * shape.hidden / WEIGHTS_BYTES_PER_US, 1)]],
        "lora": operator_tables(shape),
        "switch": {
            way: [[rank, round(us * shape.target_params / LLAVA_7B.target_params, 1)] for rank, us in points]
            for way, points in SWITCH_US.items()
        },
        "load_gb_per_s": LOAD_GB_PER_S,
        "load_latency_us": 0.0,
        "host_step_us": 0.0,
        "host_request_us": 0.0,
    }


def main() -> None:
    """Write all analytic profiles."""
    argparse.ArgumentParser("python -m sim.analytic", description="Write the analytic profiles that ship anew.").parse_args()
    for model in SHAPES:
        path = PROFILES / f"analytic-h200-{model}.json"
        path.write_text(json.dumps(analytic_profile(model), indent=1) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()

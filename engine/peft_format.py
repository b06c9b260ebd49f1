"""Adapters on disk in PEFT's format, read with every check made before anything is allocated, and written for replays.

A folder holds adapter_config.json and adapter_model.safetensors. Plain LoRA and rsLoRA on the language model's linears are
supported, with ranks and alphas that differ by module (rank_pattern, alpha_pattern); which modules an adapter touches is
what its weights say. Whatever else would change the result (DoRA, biases, other tuners ...) is refused by name. Pickled
weights are never opened. It knows files and shapes, no slots and no requests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.decoder import ALL_LINEAR, SLICES, projections_of
from engine.models import ModelShape
from kernels.batch import MAX_RANK

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora", "init_lora_weights", "ensure_weight_tying",
    "rank_pattern", "alpha_pattern", "eva_config",
}  # fmt: skip
"""Keys of the configuration that are understood, or do not change what a trained adapter computes."""
NEUTRAL = {"bias": ("none",)}
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base weights alone; the others (PiSSA, OLoRA ...) need a base model of their own."""
PLACES = {name: (projection, number) for projection, names in SLICES.items() for number, name in enumerate(names)}
PATTERN = re.compile(r"[\w.^$|()\[\]\\*+?-]{1,200}")
HARD = re.compile(r"\)[*+?]")
"""A pattern of an adapter's is run over a few hundred names; none of these keeps it from taking forever."""
MOST_REPEATS = 3
MAX_SCALE = float(np.finfo(np.float32).max)
"""Scales lie beside the operator's tables in float32."""
KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.language_model|language_model\.model|language_model|model)\.layers\.(\d+)\."
    r"(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.lora_([AB])(?:\.\w+)?\.weight"
)
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRITTEN = "base_model.model.model.language_model.layers.{}.{}.lora_{}.weight"

EFFECT = 0.1
"""Size of a random adapter's B: with a scale of 2 its branch is easily seen and far from drowning the base weights."""

Place = tuple[int, str, int]
"""(layer, projection, slice)."""


class AdapterError(ValueError):
    """An adapter that is not taken. The message names the file, the key and the way out."""


@dataclass(frozen=True)
class AdapterWeights:
    """The factors of one adapter: place -> (A [r, in], B [out, r]), as PEFT stores them; and what scales them all.

    rank: the largest r. Where an adapter scales its modules differently, B holds what differs from `scale`.
    """

    name: str
    rank: int
    scale: float
    digest: str
    factors: dict[Place, tuple[torch.Tensor, torch.Tensor]]


def folder_of(root: str | Path, name: str) -> Path:
    """The folder of adapter `name` below `root`. A name is an id; anything that leads out of `root` is refused."""
    if not NAME.fullmatch(name):
        raise AdapterError(f"adapter {name!r}: a name has letters, digits and ._-, up to 100, and no path")
    base = Path(root).resolve()
    folder = (base / name).resolve()
    if folder.parent != base:
        raise AdapterError(f"adapter {name!r}: {root}/{name} leads out of {root}; adapters must lie below it, not be links")
    if not folder.is_dir():
        raise AdapterError(f"adapter {name!r}: {root}/{name} is not a folder; `python -m engine make-adapters` writes some")
    return folder


def read_adapter(root: str | Path, name: str, shape: ModelShape, targets: tuple[str, ...] = ALL_LINEAR,
                 rank: int | None = None) -> AdapterWeights:
    """Adapter `name` below `root`, checked. rank: what it must have, if that is known. Raises AdapterError."""
    folder = folder_of(root, name)
    if (folder / CONFIG).is_symlink():
        raise AdapterError(f"{folder / CONFIG}: is a link, which may lead anywhere; copy the file there")
    scaling = _checked_config(folder / CONFIG)
    if rank is not None and scaling.largest != rank:
        raise AdapterError(
            f"{folder / CONFIG}: rank {scaling.largest}, but {rank} was asked for; give the ranks that the adapters have"
        )
    path = folder / WEIGHTS
    if not path.is_file() or path.is_symlink():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
        why = f"{pickled[0]} is a pickle, which is never loaded; save it as safetensors" if pickled else "it does not exist"
        raise AdapterError(f"{path}: {why}")
    factors, scale = _read_factors(path, scaling, shape, targets)
    digest = hashlib.sha256(path.read_bytes() + repr(scaling).encode()).hexdigest()
    largest = max(a.shape[0] for a, _ in factors.values())
    return AdapterWeights(name, largest if rank is None else rank, scale, digest, factors)


@dataclass(frozen=True)
class Scaling:
    """What a configuration says of ranks and scales: r and lora_alpha, and those of modules whose name matches a pattern."""

    r: int
    alpha: float
    rslora: bool
    ranks: dict[str, int]
    alphas: dict[str, float]

    @property
    def largest(self) -> int:
        """The largest rank that a module may have."""
        return max(self.r, *self.ranks.values()) if self.ranks else self.r

    def of(self, r: int, alpha: float) -> float:
        """The factor of a branch."""
        return alpha / r**0.5 if self.rslora else alpha / r

    def at(self, module: str) -> tuple[int, float]:
        """(r, lora_alpha) of the module of that name, chosen as PEFT 0.21 does (`peft.utils.other.get_pattern_key`)."""
        return _matching(self.ranks, module, self.r), _matching(self.alphas, module, self.alpha)


def _matching(patterns: dict, module: str, default):
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _checked_config(path: Path) -> Scaling:
    """Ranks and scales of a configuration that is plain LoRA."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: peft_type {kind!r}; only LORA is supported")
    for key, value in config.items():
        if key not in HARMLESS and value and value not in NEUTRAL.get(key, ()):
            raise AdapterError(f"{path}: {key} = {json.dumps(value)[:80]} is not supported; plain LoRA and rsLoRA are")
    if type(config.get("use_rslora", False)) is not bool:
        raise AdapterError(f"{path}: use_rslora {config['use_rslora']!r} is neither true nor false")
    if config.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base model; convert it")
    patterns = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns[key] = config.get(key) or {}
        if not isinstance(patterns[key], dict):
            raise AdapterError(f"{path}: {key} {json.dumps(patterns[key])[:80]} is not an object of patterns")
        for pattern in patterns[key]:
            _check_pattern(path, key, pattern)
    _check_rank(path, "r", config.get("r"))
    _check_alpha(path, "lora_alpha", config.get("lora_alpha"))
    for pattern, value in patterns["rank_pattern"].items():
        _check_rank(path, f"rank_pattern {pattern!r}", value)
    for pattern, value in patterns["alpha_pattern"].items():
        _check_alpha(path, f"alpha_pattern {pattern!r}", value)
    return Scaling(
        config["r"], float(config["lora_alpha"]), config.get("use_rslora") is True, patterns["rank_pattern"],
        patterns["alpha_pattern"],
    )  # fmt: skip


def _check_rank(path: Path, what: str, r: object) -> None:
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise AdapterError(f"{path}: {what} {r!r} is not a whole number in 1..{MAX_RANK}")


def _check_alpha(path: Path, what: str, alpha: object) -> None:
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_SCALE:
        raise AdapterError(f"{path}: {what} {alpha!r:.40} is not a number that float32 holds")


def _check_pattern(path: Path, what: str, pattern: str) -> None:
    repeats = sum(pattern.count(mark) for mark in "*+?")
    if not PATTERN.fullmatch(pattern) or HARD.search(pattern) or repeats > MOST_REPEATS:
        raise AdapterError(
            f"{path}: {what} {pattern[:80]!r} is not supported: names, and patterns of at most {MOST_REPEATS} repetitions "
            "without a repeated group, are"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{path}: {what} {pattern[:80]!r} is no pattern ({error})") from None


def _read_factors(path: Path, scaling: Scaling, shape: ModelShape, targets: tuple[str, ...]) -> tuple[dict, float]:
    from safetensors import SafetensorError, safe_open

    projections = projections_of(shape)
    found: dict[Place, dict[str, torch.Tensor]] = {}
    scales: dict[Place, float] = {}
    try:
        with safe_open(path, "pt", "cpu") as file:
            places = {key: _place(path, key, shape, targets) for key in file.keys()}  # noqa: SIM118  (not a dict)
            for key, (place, half) in places.items():
                _, projection, number = place
                piece, size = file.get_slice(key), projections[projection]
                r, alpha = scaling.at(key.removeprefix("base_model.model.").partition(".lora_")[0])
                scales[place] = scaling.of(r, alpha)
                expected = [r, size.d_in] if half == "A" else [size.widths[number], r]
                if list(piece.get_shape()) != expected:
                    raise AdapterError(f"{path}: {key} has shape {list(piece.get_shape())}, expected {expected}")
                if piece.get_dtype() not in TYPES:
                    raise AdapterError(f"{path}: {key} is {piece.get_dtype()}; supported are {', '.join(TYPES)}")
                if half in found.setdefault(place, {}):
                    raise AdapterError(f"{path}: {key} gives the same weight a second time")
                found[place][half] = torch.empty(0)
            for key, (place, half) in places.items():  # every header was right: now read
                tensor = found[place][half] = file.get_tensor(key)
                if not bool(torch.isfinite(tensor).all()):
                    raise AdapterError(f"{path}: {key} has values that are not finite")
    except SafetensorError as error:
        raise AdapterError(f"{path}: is not safetensors ({error})") from None
    if not found:
        raise AdapterError(f"{path}: holds no weights")
    for (layer, projection, number), halves in found.items():
        if len(halves) != 2:
            module = SLICES[projection][number]
            raise AdapterError(f"{path}: layer {layer} {module} has lora_{next(iter(halves))} but not the other half")
    common = next((scale for scale in (scaling.of(scaling.r, scaling.alpha), *scales.values()) if scale), 0.0)
    return {place: (both["A"], _scaled(both["B"], scales[place], common)) for place, both in found.items()}, common


def _scaled(b: torch.Tensor, scale: float, common: float) -> torch.Tensor:
    """`b` so that scaling it by `common` gives what `scale` would. Bits are left alone where the two are equal."""
    return b if scale == common else b.float() * (scale / common)


def _place(path: Path, key: str, shape: ModelShape, targets: tuple[str, ...]) -> tuple[Place, str]:
    match = KEY.fullmatch(key)
    if match is None:
        if any(part in key for part in ("vision", "visual", "projector")):
            raise AdapterError(f"{path}: {key} adapts the vision side; only adapters of the language model are supported")
        raise AdapterError(f"{path}: {key} is no LoRA weight of the language model")
    layer, module, half = int(match[1]), match[2], match[3]
    projection, number = PLACES[module]
    if layer >= shape.layers:
        raise AdapterError(f"{path}: {key}: the model has {shape.layers} layers")
    if projection not in targets:
        raise AdapterError(f"{path}: {key}: {projection} is not among the targets {', '.join(targets)}; add --targets all")
    return (layer, projection, number), half


def random_adapter(shape: ModelShape, name: str, rank: int, targets: tuple[str, ...],
                   rng: np.random.Generator) -> AdapterWeights:
    """An adapter with normal factors of a visible effect; lora_alpha = 2 rank.

    The numbers come from one drawn block, read on from a new place for each tensor: hundreds of adapters take seconds.
    """
    block = torch.from_numpy(rng.standard_normal(1 << 18, np.float32))
    factors = {}
    for name_of, projection in projections_of(shape, targets).items():
        for layer in range(shape.layers):
            for number, width in enumerate(projection.widths):
                a = _drawn(block, rng, (rank, projection.d_in)) * projection.d_in**-0.5
                b = _drawn(block, rng, (width, rank)) * (EFFECT * rank**-0.5)
                factors[layer, name_of, number] = (a, b)
    return AdapterWeights(name, rank, 2.0, f"random:{name}:{rank}:{int(rng.integers(1 << 62))}", factors)


def _drawn(block: torch.Tensor, rng: np.random.Generator, size: tuple[int, int]) -> torch.Tensor:
    count = size[0] * size[1]
    start = int(rng.integers(len(block)))
    repeats = -(-(start + count) // len(block))
    return block.repeat(repeats)[start : start + count].view(size)


def write_adapter(root: str | Path, weights: AdapterWeights, model: str,
                  extra: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write `weights` as a PEFT folder below `root`, whole or not at all. extra: a task head's tensors (`engine.heads`)."""
    from safetensors.torch import save_file

    from engine.heads import FILE

    if not NAME.fullmatch(weights.name):
        raise AdapterError(f"adapter {weights.name!r}: a name has letters, digits and ._-, up to 100, and no path")
    folder = Path(root) / weights.name
    if folder.exists():
        raise AdapterError(f"{folder}: exists already; name another folder")
    tensors = {
        WRITTEN.format(layer, SLICES[projection][number], half): tensor.contiguous()
        for (layer, projection, number), pair in weights.factors.items()
        for half, tensor in zip("AB", pair, strict=True)
    }
    modules = sorted({SLICES[p][n].rpartition(".")[2] for _, p, n in weights.factors})
    config = {
        "peft_type": "LORA", "base_model_name_or_path": model, "r": weights.rank, "lora_dropout": 0.0, "bias": "none",
        "lora_alpha": weights.scale * weights.rank, "use_rslora": False, "inference_mode": True, "task_type": "CAUSAL_LM",
        "target_modules": rf".*language_model.*\.({'|'.join(modules)})",
    }  # fmt: skip
    partial = folder.with_name(f".{weights.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a write that failed
    partial.mkdir(parents=True)
    save_file(tensors, partial / WEIGHTS, {"format": "pt"})
    if extra:
        save_file(dict(extra), partial / FILE, {"format": "pt"})
    (partial / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    os.replace(partial, folder)
    return folder

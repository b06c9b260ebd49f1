"""`python -m engine profile --out FILE`: measure this GPU under one model and write the simulator's latency profile.

Every measurement is appended to FILE's rows (`FILE.rows.jsonl`) as it comes; the same command goes on where it stopped, and
measures nothing twice. When the rows suffice, the profile is written in one piece. It says on stderr how far steps that no
table holds are from what the profile predicts. The order of parts is by importance, so that `--max-seconds` cuts the least.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from engine.build import CPU_PAGES, adapter_bytes_per_rank, build, find_adapters
from engine.decoder import Decoder, projections_of
from engine.models import Model
from engine.options import EXIT_TIME, TARGETS
from engine.profile_fit import UnfinishedError, profile_of
from engine.profile_host import host_scene
from engine.profile_parts import (
    PARTS,
    Grid,
    Job,
    attempt,
    attention_jobs,
    capture,
    check_jobs,
    linear_jobs,
    load_jobs,
    lora_jobs,
    lora_sizes,
    prefill_jobs,
    switch_jobs,
    vision_jobs,
)
from engine.replay import EngineConfig
from engine.rows_file import RowsFile
from engine.serve import describe_device, find_profile, frozen_heap, model_of, profile_for
from engine.stage import Stage
from kernels import tiles
from kernels.batch import RANK_ALIGN, LoraError
from policies import make_policy
from policies.profile import Profile, ProfileError
from policies.view import Limits
from traces.assign import make_adapters
from traces.suggest import near
from traces.whole_file import replace_text

POLICY_OF = {"atmm": "valora", "slora": "slora", "punica": "punica", "dlora": "dlora", "vllm": "fcfs"}
"""Operators, and a policy that runs each: the first is the one that everything but the rivals' branches is timed with."""
HOSTS = ("slora", "valora", "dlora", "punica", "merged-only", "base", "fcfs", "cost-aware", "oracle")
QUICK_HOSTS = 6
SWITCHES = Path(tiles.__file__).parent / "results" / "switch_h200.csv"
FORMS = {"addmm": "addmm_golden", "peft": "peft_merge"}
SWITCH_MODELS = {"llava-1.5-7b": "llava-7b", "llava-1.5-13b": "llava-7b", "qwen2-vl-7b": "qwen2-vl-7b"}
"""Our model -> the one of the switch results whose times count, scaled by the weights that a switch rewrites."""


def profile(args: argparse.Namespace) -> int:
    """The command. 0; 75 while rows are missing, after which the same command goes on."""
    parts = _chosen(args.parts, PARTS, "--parts")
    operators = _chosen(args.operators, tuple(POLICY_OF), "--operators")
    began = time.monotonic()
    run = Run(args, parts, operators, lambda: bool(args.max_seconds) and time.monotonic() - began > args.max_seconds)
    unfinished, steps = "no engine was ready by then; give it more --max-seconds", None
    for _ in run.measure():  # a process killed later leaves a profile
        try:
            steps = run.write()
        except UnfinishedError as error:
            unfinished = f"{len(run.rows)} rows in {run.file.path}; {error}"
    if steps is None:
        print(unfinished, file=sys.stderr)
        return EXIT_TIME
    for key, measured, predicted in steps:
        off = 100 * (predicted / measured - 1)
        print(f"{key}: {measured / 1e3:.3f} ms measured, predicted {off:+.1f} %", file=sys.stderr)
    print(run.out)
    left = run.left()
    if left:
        print(f"{left} measurements are left; the same command goes on", file=sys.stderr)
    return EXIT_TIME if left else 0


def _chosen(text: str | None, known: tuple[str, ...], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",")] if text else list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name!r}: unknown{near(name, known)}; some of {', '.join(known)}")
    return [name for name in known if name in names]


class Run:
    """One profile in the making. late: true when no further measurement shall begin."""

    def __init__(self, args: argparse.Namespace, parts: list[str], operators: list[str], late: Callable[[], bool]):
        self.args, self.parts, self.operators, self.late = args, parts, operators, late
        self.out = Path(args.out)
        self.file = RowsFile(self.out.with_name(self.out.name + ".rows.jsonl"), anew=args.overwrite)
        self.model: Model | None = None
        self._decoder: Decoder | None = None

    @property
    def facts(self) -> dict:
        """What all rows share."""
        return self.file.facts

    @property
    def rows(self) -> dict[str, dict]:
        """The rows there are, by key."""
        return self.file.rows

    # -- engines ------------------------------------------------------------------------------------------------------
    def measure(self) -> Iterator[None]:
        """Every job of the chosen parts that has no row yet, engine by engine; comes up after each, and once at least if
        there are rows."""
        if self.facts:
            self._refuse_another_model()
        for operator, rank, first in self._engines():
            if self.late():
                break
            try:
                self._with_engine(operator, rank, first=first)
            except (RuntimeError, LoraError) as error:  # of one rival's kernels; the others are still wanted
                if first:
                    raise
                print(f"{operator} rank {rank}: left out: {type(error).__name__}: {error}", file=sys.stderr)
            yield
        if self.facts:
            yield

    def _engines(self) -> Iterator[tuple[str, int, bool]]:
        """(operator, rank, the first of all) of every engine that may be needed."""
        ranks = self.args.ranks
        for number, rank in enumerate(ranks if "ranks" in self.parts and not self.args.quick else ranks[:1]):
            for operator in self.operators:
                yield operator, rank, not number and operator == self.operators[0]

    def left(self) -> int:
        """Measurements that are still to be made."""
        return sum(len(self._pending(*engine)) for engine in self._engines())

    def write(self) -> list[tuple[str, float, float]]:
        """Make the profile of the rows there are; the steps that no table holds. Raises UnfinishedError."""
        data, steps = profile_of(self.rows, self.facts, self.provenance(), self.out, operators_of(self.facts["model"]))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.out, json.dumps(data, indent=1) + "\n")
        return steps

    def _with_engine(self, operator: str, rank: int, *, first: bool) -> None:
        wanted = first or "lora" in self.parts or "ranks" in self.parts
        if not wanted or (self.facts and not self._pending(operator, rank, first)):
            return
        began = time.monotonic()
        stage = self._built(operator, rank)
        if not self.facts:
            self._begin(stage, rank)
        capture(stage, lora_sizes(self._grid(), quick=self.args.quick), everything=first)
        print(f"{operator} rank {rank}: engine ready after {time.monotonic() - began:.1f} s", file=sys.stderr)
        with frozen_heap():
            for job in self._pending(operator, rank, first):
                if self.late():
                    return
                self._keep(attempt(job, stage), job)

    def _built(self, operator: str, rank: int) -> Stage:
        args = self.args
        if self.model is None:
            self.model = model_of(args)
            self._decoder = Decoder(self.model)
        model = self.model
        context = args.max_context or min(model.shape.max_context, 4096)
        config = EngineConfig(
            limits=Limits(args.max_batch, args.max_batch_tokens, context), operator=self._operator(operator),
            targets=TARGETS[args.targets], memory_share=args.memory_share, seed=args.seed,
        )  # fmt: skip
        adapters = make_adapters(max(2, args.adapters), (rank,))
        policy = make_policy(POLICY_OF[operator])
        found = find_adapters(adapters, model, config.targets, None, args.seed)
        known = find_profile(args.profile, model, measured=False)  # the measured one is what is being made, and lacks tables
        engine = build(model, self._decoder, adapters, found, policy, known, config)
        if model.device.type == "cuda":
            engine.runner.cache.keys.normal_()
            engine.runner.cache.values.normal_()
        return Stage(engine, config, policy)

    def _operator(self, operator: str) -> str | None:
        """None on a CPU, where every policy's operator is the plain reference."""
        return operator if self.model.device.type == "cuda" else None

    def _grid(self) -> Grid:
        return Grid(**{name: tuple(v) if isinstance(v, list) else v for name, v in self.facts["grid"].items()})

    # -- rows ---------------------------------------------------------------------------------------------------------
    def _jobs(self, operator: str, rank: int, first: bool) -> Iterator[tuple[str, Job]]:
        grid, quick, adapters = self._grid(), self.args.quick, max(2, self.args.adapters)
        again = rank != self.args.ranks[0]
        if first:
            yield from (("linear", job) for job in linear_jobs(grid))
            yield from (("prefill", job) for job in prefill_jobs(grid))
            yield from (("attention", job) for job in attention_jobs(grid))
            yield from (("vision", job) for job in vision_jobs(grid))
            yield from (("host", job) for job in self._hosts(HOSTS[:1]))
        if first or (again and operator == self.operators[0]):
            yield from (("ranks" if again else "switch", job) for job in switch_jobs(rank))
            yield from (("ranks" if again else "load", job) for job in load_jobs(rank))
        mixture = operator == "atmm"
        for job in lora_jobs(grid, operator, rank, adapters, mixture=mixture, quick=quick or again):
            yield ("ranks" if again else "lora"), job
        if first:
            yield from (("host", job) for job in self._hosts(HOSTS[1 : QUICK_HOSTS if quick else None]))
            yield from (("check", job) for job in check_jobs(grid, adapters))

    def _hosts(self, names: Sequence[str]) -> Iterator[Job]:
        """Short replays; of all but the first little more than the decisions is needed."""
        for name in names:
            seconds = self.args.host_seconds / (1 if name == HOSTS[0] else 3)
            yield f"host {name}", lambda stage, name=name, seconds=seconds: host_scene(stage, name, seconds=seconds)

    def _pending(self, operator: str, rank: int, first: bool) -> list[Job]:
        return [job for part, job in self._jobs(operator, rank, first) if part in self.parts and job[0] not in self.rows]

    def _keep(self, row: dict | None, job: Job) -> None:
        if row is None:  # nor will it the next time
            self.file.keep({"key": job[0], "what": "left out"})
            print(f"{job[0]}: does not fit this engine, left out", file=sys.stderr)
            return
        self.file.keep(row)
        print(f"{row['key']}: {row['us'] / 1e3:.3f} ms ({row['times']} times)", file=sys.stderr)

    # -- what was measured ----------------------------------------------------------------------------------------------
    def _begin(self, stage: Stage, rank: int) -> None:
        """The header of the rows: sizes, limits, grid, versions."""
        model, args, engine = self.model, self.args, stage.engine
        shape = model.shape
        golden = _target_bytes(self._decoder, TARGETS[args.targets])
        weights = sum(parameter.nbytes for parameter in model.hf.parameters())
        pages = engine.ledger.pool.pages + (engine.ledger.pool.adapter_room or 0)  # the simulator's pool holds adapters, too
        if model.device.type == "cuda":
            device = torch.cuda.get_device_properties(model.device).total_memory
        else:
            device = weights + golden + CPU_PAGES * engine.page_bytes
        self.file.begin({
            "model": shape.name, "max_context": shape.max_context, "image_tokens": shape.image_tokens,
            "video_images": 3 if shape.family == "llava" else 6, "kv_bytes_per_token": shape.kv_bytes_per_token(model.dtype),
            "adapter_bytes_per_rank": adapter_bytes_per_rank(shape, TARGETS[args.targets], model.dtype),
            "weights_bytes": weights, "golden_bytes": golden, "device_bytes": device,
            "reserve_bytes": max(0, device - weights - golden - pages * engine.page_bytes), "steps_ahead": int(stage.cuda),
            "rank_align": RANK_ALIGN, "stairs": engine.runner.graphs is not None, "adapters": max(2, args.adapters),
            "rank": rank, "grid": asdict(Grid.of(stage, quick=args.quick)), "limits": asdict(stage.config.limits),
            "seed": args.seed, "targets": args.targets, "device": describe_device(model.device),
            "weights": "random" if model.random else "given", "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "tiles_sha256": _tiles_sha256(), "switches": _other_switches(shape.name, golden),
        })  # fmt: skip

    def _refuse_another_model(self) -> None:
        asked = {"rank": self.args.ranks[0], "targets": self.args.targets, "adapters": max(2, self.args.adapters)}
        asked["limits"] = {"max_batch": self.args.max_batch, "max_batch_tokens": self.args.max_batch_tokens}
        for name, value in asked.items():
            there = self.facts[name]
            if (there != value) if name != "limits" else any(there[key] != own for key, own in value.items()):
                raise ValueError(
                    f"{self.file.path}: was measured with {name} {there}, not {value}; name another --out, or --overwrite it"
                )
        if self.args.model != self.facts["model"] and not Path(self.args.model).is_dir():
            raise ValueError(f"{self.file.path}: is of {self.facts['model']}, not {self.args.model}; name another --out")

    def provenance(self) -> dict:
        """Where the numbers come from."""
        facts = self.facts
        versions = ", ".join(f"{name} {facts['device'][name]}" for name in ("torch", "triton", "transformers") if facts)
        gpu = {"gpu": facts["device"]["gpu"]} if "gpu" in facts["device"] else {}
        return {
            "device": facts["device"]["name"], **gpu, "date": facts["date"],
            "versions": f"{versions}, CUDA {facts['device']['cuda']}",
            "command": "python -m engine profile " + shlex.join(self.args.words[1:]), "rows": len(self.rows),
            "weights": facts["weights"], "limits": facts["limits"], "tiles_sha256": facts["tiles_sha256"],
            "switch": "fused by the engine; addmm and peft, where given, from kernels/results/switch_h200.csv",
            "ranks": "others than measured: in proportion to the operators' times by themselves (analytic profile)",
        }  # fmt: skip


def operators_of(model: str) -> Profile | None:
    """The analytic profile, whose tables of the operators were measured by themselves; None for a model without one."""
    try:
        return profile_for(None, model, measured=False)
    except ProfileError:
        return None


def _target_bytes(decoder: Decoder, targets: tuple[str, ...]) -> int:
    """Weights that a switch rewrites, and keeps pristine."""
    layers = range(decoder.shape.layers)
    return sum(decoder.weight((layer, name)).nbytes for layer in layers for name in projections_of(decoder.shape, targets))


def _tiles_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted((Path(tiles.__file__).parent / "tiles").glob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _other_switches(model: str, golden_bytes: int) -> dict[str, list[list[float]]]:
    """Folding per layer (addmm) and PEFT's, from the results of the switch by itself; none for a model not in them."""
    if model not in SWITCH_MODELS or not SWITCHES.exists():
        return {}
    with SWITCHES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    source = [row for row in rows if row["model"] == SWITCH_MODELS[model] and row["rank"]]
    restored = {row["model"]: row["moved_bytes"] for row in rows if row["form"] == "restore_golden"}
    scale = 2 * golden_bytes / float(restored[SWITCH_MODELS[model]])
    found: dict[str, list[list[float]]] = {}
    for way, form in FORMS.items():
        points = [[int(row["rank"]), round(1e3 * float(row["ms"]) * scale, 1)] for row in source if row["form"] == form]
        if points:
            found[way] = sorted(points)
    return found

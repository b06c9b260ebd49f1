"""Puts an engine together: adapters from files or made up, memory divided, ledger, runner and graphs made for one policy.

Adapters lie in a memory of their own: what all of them need, up to a share of what is free, or what was asked for. What
weights, adapters and a reserve leave becomes KV pages. The ledger counts both apart (`Pool.adapter_room`), so no byte counts
twice; S-LoRA's pool, in which pages change sides, is the simulator's. It decides nothing while the engine runs.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.adapters import HostAdapter, Loader, packed, random_packed
from engine.cache import PageCache
from engine.decoder import Decoder, projections_of
from engine.graphs import BRANCHED, MIXED, DecodeGraphs, PackedGraphs, compile_branches
from engine.heads import HeadError, TaskHead, random_head, read_head
from engine.lora import Lora, operator_of, padded_rank
from engine.models import Model, ModelError, ModelShape
from engine.peft_format import AdapterError, folder_of, read_adapter
from engine.replay import EngineConfig
from engine.runner import Runner
from kernels.batch import RANK_ALIGN
from policies import Policy, residency
from policies.cost import Cost
from policies.journal import Journal
from policies.ledger import Ledger
from policies.pool import Pool
from policies.profile import Profile
from traces.request import Adapter

RESERVE_BYTES = 6 << 30
"""Left free on a GPU for libraries' workspaces, graphs and the allocator's fragments."""
CPU_PAGES = 1024
RANDOM_CLASSES = 101
"""Classes of a made-up task head, as many as UCF-101 has."""
ADAPTER_STREAM = 5
RANDOM_BLOCK = 1 << 20
RANDOM_COPIES = 32
"""Made-up adapters of one rank that differ; further ones share their bytes on the host, so that hundreds fit."""
ADAPTER_SHARE = 0.25
"""Of the free memory that adapters take at most, if nobody says."""


@dataclass
class Adapters:
    """The adapters of a trace by number: host copies and task heads, None for a bad one; reasons by name."""

    hosts: list[HostAdapter | None]
    heads: list[TaskHead | None]
    reasons: dict[str, str]


def find_adapters(adapters: tuple[Adapter, ...], model: Model, targets: tuple[str, ...], root: str | Path | None,
                  seed: int) -> Adapters:
    """Adapters by name from folders below `root`, or random ones. A bad one is left out with its reason, alone."""
    found = Adapters([], [], {})
    shape, pinned = model.shape, model.device.type == "cuda"
    projections = projections_of(shape, targets)
    block = torch.from_numpy(np.random.default_rng([seed, ADAPTER_STREAM]).standard_normal(RANDOM_BLOCK, np.float32))
    block = block.to(model.dtype)
    made: dict[int, list[HostAdapter]] = {}  # by rank

    for number, adapter in enumerate(adapters):
        if root is None:
            rng = np.random.default_rng([seed, ADAPTER_STREAM, number])
            alike = made.setdefault(adapter.rank, [])
            if len(alike) < RANDOM_COPIES:
                alike.append(
                    random_packed(adapter.name, adapter.rank, projections, shape.layers, block, pinned=pinned, rng=rng)
                )
                found.hosts.append(alike[-1])
            else:
                found.hosts.append(replace(alike[number % RANDOM_COPIES], name=adapter.name))
            head = random_head(shape, RANDOM_CLASSES, torch.Generator().manual_seed(seed + number))
            found.heads.append(TaskHead(head["classes.weight"], head["classes.bias"]))
            continue
        try:
            weights = read_adapter(root, adapter.name, shape, targets, adapter.rank)
            head = read_head(folder_of(root, adapter.name), shape, model.dtype)
            host = packed(weights, projections, shape.layers, model.dtype, pinned=pinned)
        except (AdapterError, HeadError) as error:
            found.reasons[adapter.name] = str(error)
            found.hosts.append(None)
            found.heads.append(None)
            continue
        found.hosts.append(host)
        found.heads.append(head)
    return found


@dataclass
class Engine:
    """The parts of a run. page_bytes: of a KV page in all layers. operator: the one that runs, by its own name."""

    runner: Runner
    ledger: Ledger
    journal: Journal
    cost: Cost | None
    page_bytes: int
    operator: str

    def renew(self, config: EngineConfig, policy: Policy) -> None:
        """Forget everything that was served: plain weights, no adapter resident, an empty cache, new books."""
        runner, old = self.runner, self.ledger.pool
        runner.loader.drain()
        runner.lora.evict_all()
        for request in list(runner.sequences):
            runner.drop(request)
        runner.answers.clear()
        pool = old.emptied()
        runner.cache.attach(pool)
        self.journal = Journal(keep_steps=config.keep_steps)
        self.ledger = Ledger(pool, config.limits, self.journal, self.cost, oracle=policy.oracle)

    def hold(self, names: tuple[str, ...]) -> None:
        """Before the first request: load these adapters and pin them. ResidencyError where they do not fit or are bad."""
        numbers = residency.numbers_of(names, self.ledger.pool.adapters)
        for number in numbers:
            if self.runner.loader.adapters[number] is None:
                raise residency.ResidencyError(f"--pin {names[numbers.index(number)]}: that adapter could not be read")
        residency.hold(self.ledger, numbers)
        for number in numbers:
            self.runner.loader.start(number)
        self.runner.loader.drain()
        for number in numbers:
            self.runner.lora.installed(number)


def adapter_bytes_per_rank(shape: ModelShape, targets: tuple[str, ...], dtype: torch.dtype) -> int:
    """Bytes of an adapter's factors for each unit of its rank."""
    projections = projections_of(shape, targets).values()
    return shape.layers * sum(p.slices * p.d_in + p.d_out for p in projections) * dtype.itemsize


def build(model: Model, decoder: Decoder, adapters: tuple[Adapter, ...], found: Adapters, policy: Policy,
          profile: Profile | None, config: EngineConfig) -> Engine:
    """An engine for one policy. profile: what the policy predicts with; None for one that never does.

    Raises ModelError where the memory holds no page, LoraError for an unknown operator, ProfileError for a profile without
    what the policy wants to know.
    """
    shape, limits = model.shape, config.limits
    operator = operator_of(config.operator, policy.operator, model.device)
    page_bytes = config.page_tokens * shape.kv_bytes_per_token(model.dtype)
    per_rank = adapter_bytes_per_rank(shape, config.targets, model.dtype)
    rows = 0 if getattr(policy, "strips_adapters", False) else _adapter_rows(model, adapters, per_rank, config)
    lora = Lora(
        decoder, adapters, operator, merges=policy.merges, max_tokens=limits.max_batch_tokens, targets=config.targets,
        rows=rows, spare=config.spare_adapters,
    )  # fmt: skip
    if config.graphs and model.device.type == "cuda":
        kinds = () if not rows else (BRANCHED, MIXED) if policy.merges else (BRANCHED,)
        compile_branches(lora, kinds, max_batch=limits.max_batch, max_tokens=limits.max_batch_tokens)
    loader = Loader(lora, list(found.hosts))
    pages = config.pages or _pages(model, page_bytes, config)
    adapter_pages = tuple(pages_of_rank(adapter.rank, per_rank, page_bytes) for adapter in adapters)
    # Each adapter counts in whole pages, so that as many as the ledger lets in always find rows.
    room = rows * per_rank // page_bytes
    if rows >= sum(padded_rank(adapter.rank) for adapter in adapters):
        room = max(room, sum(adapter_pages))
    pool = Pool(
        pages, config.page_tokens, adapters, adapter_pages, prefix_cache=config.prefix_cache, adapter_room=room
    )  # fmt: skip
    cache = PageCache(shape, pool, dtype=model.dtype, device=model.device)
    heads = [None if head is None else head.to(decoder.head) for head in found.heads]
    runner = Runner(model, decoder, cache, lora, loader, heads, max_context=limits.max_context, seed=config.seed)
    if config.graphs and model.device.type == "cuda":
        parts = (decoder, cache, lora, runner.last_tokens)
        runner.graphs = DecodeGraphs(*parts, max_batch=limits.max_batch, width=runner.width)
        runner.packed_graphs = PackedGraphs(
            *parts, max_batch=limits.max_batch, max_tokens=limits.max_batch_tokens, width=runner.width
        )  # fmt: skip
    cost = Cost(profile, policy.operator, policy.switch, adapters, policy.name) if profile is not None else None
    journal = Journal(keep_steps=config.keep_steps)
    return Engine(runner, Ledger(pool, limits, journal, cost, oracle=policy.oracle), journal, cost, page_bytes, operator)


def pages_of_rank(rank: int, per_rank: int, page_bytes: int) -> int:
    """Pages that an adapter's rows take."""
    return -(-padded_rank(rank) * per_rank // page_bytes)


def _adapter_rows(model: Model, adapters: tuple[Adapter, ...], per_rank: int, config: EngineConfig) -> int:
    """Rows of the adapters' memory. ModelError where it does not hold the largest adapter, or is not there."""
    ranks = [padded_rank(adapter.rank) for adapter in adapters]
    rows = wanted = sum(ranks) + config.spare_adapters * max(ranks, default=RANK_ALIGN)
    free = None
    if model.device.type == "cuda":
        _tidy()
        free, _ = torch.cuda.mem_get_info(model.device)
    if config.adapter_bytes is not None:
        rows = config.adapter_bytes // per_rank
    elif free is not None:
        rows = max(int(free * config.memory_share * ADAPTER_SHARE) // per_rank, *ranks, 0)
    rows = min(rows, wanted) // RANK_ALIGN * RANK_ALIGN
    needed = max(ranks, default=0)
    if rows < needed or (free is not None and rows * per_rank > free):
        raise ModelError(
            f"adapters have {rows * per_rank} bytes ({free if free is not None else 'any number'} are free) and the largest "
            f"takes {needed * per_rank}; change --adapter-memory or take smaller ranks"
        )
    return rows


def _tidy() -> None:
    gc.collect()  # an engine of another policy may lie about
    torch.cuda.empty_cache()


def _pages(model: Model, page_bytes: int, config: EngineConfig) -> int:
    """Pages that the free memory holds beside the largest step's activations and a reserve."""
    if model.device.type != "cuda":
        return max(1, int(CPU_PAGES * config.memory_share))
    _tidy()
    shape = model.shape
    row = 4 * shape.hidden + 3 * shape.intermediate + 2 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    step = config.limits.max_batch_tokens * row * model.dtype.itemsize
    step += config.limits.max_context * page_bytes // config.page_tokens  # a context's keys and values
    free, _ = torch.cuda.mem_get_info(model.device)
    pages = int((free - step - RESERVE_BYTES) * config.memory_share) // page_bytes
    if pages < 1:
        raise ModelError(
            f"{free} bytes are free, {step + RESERVE_BYTES} are needed for a step and the reserve: no KV page is left; "
            "take fewer adapters or a smaller --max-batch-tokens"
        )
    return pages

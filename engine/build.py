"""Puts an engine together: adapters from files or made up, memory divided, ledger, runner and graphs made for one policy.

The memory that weights, adapters' slots and a reserve leave becomes KV pages. Adapters' slots are memory of their own, while
the ledger counts adapters among its pages (the unified pool): it then holds KV back for adapters that need none, so that its
count is on the safe side by the adapters' size. It decides nothing while the engine runs.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine.adapters import HostAdapter, Loader, packed, random_packed
from engine.cache import PageCache
from engine.decoder import Decoder, projections_of
from engine.graphs import DecodeGraphs, PackedGraphs
from engine.heads import HeadError, TaskHead, random_head, read_head
from engine.lora import Lora, operator_of
from engine.models import Model, ModelError, ModelShape
from engine.peft_format import AdapterError, AdapterWeights, folder_of, read_adapter
from engine.replay import EngineConfig
from engine.runner import Runner
from policies import Policy
from policies.cost import Cost
from policies.journal import Journal
from policies.ledger import Ledger
from policies.pool import Pool
from policies.profile import Profile
from traces.request import Adapter

RESERVE_BYTES = 3 << 30
"""Left free on a GPU for libraries' workspaces, graphs and the allocator's fragments."""
CPU_PAGES = 1024
RANDOM_CLASSES = 101
"""Classes of a made-up task head, as many as UCF-101 has."""
ADAPTER_STREAM = 5
RANDOM_BLOCK = 1 << 20


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

    def keep(weights: AdapterWeights) -> None:
        found.hosts.append(packed(weights, projections, shape.layers, model.dtype, pinned=pinned))

    for number, adapter in enumerate(adapters):
        if root is None:
            rng = np.random.default_rng([seed, ADAPTER_STREAM, number])
            found.hosts.append(
                random_packed(adapter.name, adapter.rank, projections, shape.layers, block, pinned=pinned, rng=rng)
            )
            head = random_head(shape, RANDOM_CLASSES, torch.Generator().manual_seed(seed + number))
            found.heads.append(TaskHead(head["classes.weight"], head["classes.bias"]))
            continue
        try:
            weights = read_adapter(root, adapter.name, shape, targets, adapter.rank)
            head = read_head(folder_of(root, adapter.name), shape)
        except (AdapterError, HeadError) as error:
            found.reasons[adapter.name] = str(error)
            found.hosts.append(None)
            found.heads.append(None)
            continue
        keep(weights)
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
        pool = Pool(old.pages, old.page_tokens, old.adapters, old.adapter_pages, prefix_cache=config.prefix_cache)
        runner.cache.attach(pool)
        self.journal = Journal(keep_steps=config.keep_steps)
        self.ledger = Ledger(pool, config.limits, self.journal, self.cost, oracle=policy.oracle)


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
    lora = Lora(
        decoder, adapters, operator, merges=policy.merges, max_tokens=limits.max_batch_tokens, targets=config.targets
    )
    loader = Loader(lora, found.hosts)
    page_bytes = config.page_tokens * shape.kv_bytes_per_token(model.dtype)
    pages = config.pages or _pages(model, page_bytes, config)
    per_rank = adapter_bytes_per_rank(shape, config.targets, model.dtype)
    adapter_pages = tuple(-(-adapter.rank * per_rank // page_bytes) for adapter in adapters)
    pool = Pool(pages, config.page_tokens, adapters, adapter_pages, prefix_cache=config.prefix_cache)
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


def _pages(model: Model, page_bytes: int, config: EngineConfig) -> int:
    """Pages that the free memory holds beside the largest step's activations and a reserve."""
    if model.device.type != "cuda":
        return max(1, int(CPU_PAGES * config.memory_share))
    gc.collect()  # an engine of another policy may lie about
    torch.cuda.empty_cache()
    shape = model.shape
    row = 4 * shape.hidden + 3 * shape.intermediate + 2 * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    step = config.limits.max_batch_tokens * row * model.dtype.itemsize + 2 * config.limits.max_context * page_bytes
    free, _ = torch.cuda.mem_get_info(model.device)
    pages = int((free - step - RESERVE_BYTES) * config.memory_share) // page_bytes
    if pages < 1:
        raise ModelError(
            f"{free} bytes are free, {step + RESERVE_BYTES} are needed for a step and the reserve: no KV page is left; "
            "take fewer adapters or a smaller --max-batch-tokens"
        )
    return pages

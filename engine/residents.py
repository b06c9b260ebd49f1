"""Adapters at run time: add a folder, take one out, pin, unpin, load. What `Driver` runs goes on meanwhile.

A method may be called from any thread; it does what is slow (reading, checking, packing a folder) there, and the rest
between two leases of the loop. It answers with a Future: the adapter's number, or the error that names the way out. Taking
an adapter out lets those of its requests that have run go on to their end; those that wait fail with the reason, and so do
later ones; its memory, on the device and the host, comes back after the last. It decides nothing about who runs.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from engine.adapters import HostAdapter, packed
from engine.build import Engine, adapter_bytes_per_rank, pages_of_rank
from engine.heads import TaskHead, read_head
from engine.lora import padded_rank
from engine.peft_format import AdapterError, AdapterWeights, folder_of, read_adapter
from engine.replay import Driver
from policies import residency
from traces.request import Adapter


class Residents:
    """The adapters of a running engine, by name. root: the folder that new ones lie in."""

    def __init__(self, engine: Engine, driver: Driver, root: str | Path | None = None):
        self._engine, self._driver, self._root = engine, driver, root
        self._leaving: set[int] = set()
        driver.watchers.append(self._finish_leaving)

    @property
    def names(self) -> dict[str, int]:
        """Adapters that can be asked for, with the numbers by which requests name them."""
        adapters = enumerate(self._driver.ledger.pool.adapters)
        return {adapter.name: number for number, adapter in adapters if number not in self._driver.gone}

    # -- what may be asked --------------------------------------------------------------------------------------------
    def add(self, name: str) -> Future[int]:
        """Read folder `name` below the root and know it; it loads when a request asks for it."""
        lora, shape, model = self._engine.runner.lora, self._engine.runner.model.shape, self._engine.runner.model
        try:
            if self._root is None:
                raise AdapterError(f"adapter {name!r}: say with --adapter-dir where adapters lie")
            weights = read_adapter(self._root, name, shape, lora.targets)
            if padded_rank(weights.rank) > lora.rank:
                raise AdapterError(
                    f"adapter {name!r}: rank {weights.rank} is above {lora.rank}, the largest that this engine was made for"
                )
            head = read_head(folder_of(self._root, name), shape, model.dtype)
            host = packed(
                weights, lora.pool.projections, shape.layers, model.dtype, pinned=model.device.type == "cuda"
            )  # fmt: skip
        except Exception as error:  # as with all that is asked: the answer is the Future's
            answer: Future[int] = Future()
            answer.set_exception(error)
            return answer
        return self._ask(lambda: self._install(weights, host, head))

    def remove(self, name: str) -> Future[int]:
        """Take an adapter out, pinned or not."""
        return self._ask(lambda: self._take_leave(self._number(name)))

    def pin(self, name: str) -> Future[int]:
        """Never evict an adapter from now on; it loads at once if it is not here and fits, else when it is asked for."""

        def act() -> int:
            number = self._readable(name)
            residency.pin(self._driver.ledger, number)
            pool = self._driver.ledger.pool
            if pool.adapter_free >= pool.adapter_pages[number]:
                self._bring(number)
            return number

        return self._ask(act)

    def unpin(self, name: str) -> Future[int]:
        """An adapter may be evicted again."""

        def act() -> int:
            number = self._number(name)
            residency.unpin(self._driver.ledger, number)
            return number

        return self._ask(act)

    def load(self, name: str) -> Future[int]:
        """Begin an adapter's copy now, before anybody asks for it; idle ones are evicted for it."""
        return self._ask(lambda: self._bring(self._readable(name)))

    # -- between two leases -------------------------------------------------------------------------------------------
    def _ask(self, act: Callable[[], int]) -> Future[int]:
        return self._driver.commands.ask(act)

    def _number(self, name: str) -> int:
        names = self.names
        if name not in names:
            there = ", ".join(list(names)[:8]) + (" ..." if len(names) > 8 else "")
            raise residency.ResidencyError(f"adapter {name!r} is not here; there are {there or 'none'}")
        return names[name]

    def _readable(self, name: str) -> int:
        """The number of an adapter that can be loaded."""
        number = self._number(name)
        if self._engine.runner.loader.adapters[number] is None:
            raise residency.ResidencyError(f"adapter {name!r} could not be read, so it cannot load")
        return number

    def _install(self, weights: AdapterWeights, host: HostAdapter, head: TaskHead | None) -> int:
        engine, ledger = self._engine, self._driver.ledger
        runner, name = engine.runner, weights.name
        if name in self.names:
            raise residency.ResidencyError(f"adapter {name!r} is here already; take it out first, or use another name")
        slots = runner.lora.pool.slots
        if len(ledger.pool.adapters) >= slots:
            raise residency.ResidencyError(f"adapter {name!r}: all {slots} slots were used; start with more spare adapters")
        per_rank = adapter_bytes_per_rank(runner.model.shape, runner.lora.targets, runner.model.dtype)
        pages = pages_of_rank(weights.rank, per_rank, engine.page_bytes)
        head = None if head is None else head.to(runner.decoder.head)  # memory may run out here, so it comes first
        number = residency.extend(ledger, Adapter(name, weights.rank, weights.digest), pages)
        runner.loader.adapters.append(host)
        runner.heads.append(head)
        return number

    def _bring(self, number: int) -> int:
        ledger, runner = self._driver.ledger, self._engine.runner
        if number in ledger.pool.resident or number in ledger.pool.loading:
            return number
        for other in residency.bring(ledger, number):
            runner.lora.evict(other)
        ledger.journal.counters["load_bytes"] += runner.loader.adapters[number].nbytes
        self._driver.clock.start_load(number)
        runner.loader.start(number)
        return number

    def _take_leave(self, number: int) -> int:
        driver = self._driver
        name = driver.ledger.pool.adapters[number].name
        driver.gone.add(number)
        self._leaving.add(number)
        residency.unpin(driver.ledger, number)
        for request in residency.abandoned(driver.ledger, number):
            driver.fail(request, f"its adapter {name!r} was taken out")
        return number

    def _finish_leaving(self) -> None:
        ledger, runner = self._driver.ledger, self._engine.runner
        for number in [number for number in self._leaving if residency.may_leave(ledger, number)]:
            if number in ledger.pool.resident:
                residency.take_out(ledger, number)
                runner.lora.evict(number)
            runner.loader.adapters[number] = runner.heads[number] = None
            self._leaving.discard(number)

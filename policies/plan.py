"""What a policy decides: a `Plan`, which is a value, and the rules that make one legal.

It knows nothing of queues or memory; the ledger judges a plan against its state and names the rule that was broken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from traces.record import MODES

BASE, UNMERGED, MERGED, MIXTURE = range(4)
"""Weights' modes (VaLoRA section 4; dLoRA for the first two). Named in `MODES`, in this order.

base: y = Wx, nobody has an adapter. unmerged: y = Wx + s B_j A_j x for each request's own adapter j. merged: adapter m is
folded into W; only its requests run. mixture: m stays folded; a request of adapter j adds its own branch and subtracts m's.
"""


assert MODES == ("base", "unmerged", "merged", "mixture")


class PlanError(ValueError):
    """A plan broke a rule of the ledger: the policy is wrong. The message names the rule and the offending value."""


class PeekError(PlanError, PermissionError):
    """A policy that is no oracle asked for an output length."""


class Plan(NamedTuple):
    """One decision, which stands as a lease over a run of steps. Requests and adapters are named by id.

    prefills: (request, tokens) chunks computed in the first step; a plan that has any lasts one step. decodes: requests
    that get one token in every step of the lease. loads: adapters whose copy from host memory starts now. evicts:
    adapters whose memory is freed now. preempts: running requests that give their memory back and are recomputed later.
    aborts: waiting requests that end unserved (admission control). until_ns: re-decide at the first step boundary at or
    after this time even if nothing arrives, finishes, loads or runs out of memory; None: no such time. memo: what the
    policy wants to find in `view.memo` at its next decision (the only state a policy has).
    """

    mode: int = UNMERGED
    merged: int = -1
    prefills: tuple[tuple[int, int], ...] = ()
    decodes: tuple[int, ...] = ()
    loads: tuple[int, ...] = ()
    evicts: tuple[int, ...] = ()
    preempts: tuple[int, ...] = ()
    aborts: tuple[int, ...] = ()
    until_ns: int | None = None
    memo: Any = None


class Work(NamedTuple):
    """What the executor of a plan's first step has to do, in the numbers that its latency depends on.

    tokens = decodes + prefill_tokens. context_tokens: KV tokens read by the decodes, summed. prefills: (tokens, context
    before them) per chunk. lora_tokens: rows that go through the LoRA branch (twice for a cold request in mixture
    mode); adapters: distinct adapters among them; rank: the largest, lora_ranks: the sum of ranks over distinct ones.
    largest: rows of the adapter that has most of them, counted in steps with prompts, where they differ much (0: spread
    evenly). switch_rank: rank of the adapter folded in or taken out by a change of mode, 0 where there is none. outputs:
    rows that go through the LM head.
    """

    mode: int
    decodes: int
    context_tokens: int
    prefills: tuple[tuple[int, int], ...]
    prefill_tokens: int
    images: int
    lora_tokens: int
    adapters: int
    rank: int
    lora_ranks: int
    switch_rank: int
    outputs: int
    largest: int = 0

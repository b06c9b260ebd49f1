"""The unified pool and its prefix cache: pages conserve, content decides what is shared, the least recently used goes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policies.pool import Pool
from traces.request import Adapter

PAGE = 4
TWINS = (Adapter("a", 8, digest="same"), Adapter("b", 8, digest="same"), Adapter("c", 16, digest="other"))


def pool_of(pages: int = 50, **options) -> Pool:
    """Two adapters with one content, and a third."""
    return Pool(pages, PAGE, TWINS, (2, 2, 4), **options)


def compute(pool: Pool, adapter: int, prefix) -> tuple:
    """A request that computes its prefix, publishes it and ends; (node it held, KV pages that stayed its own)."""
    tokens = sum(length for _, length in prefix)
    held = pool.match(adapter, prefix, tokens + 1)
    pool.hold(held)
    own = -(-(tokens + 1) // PAGE) - pool.shared_tokens(held) // PAGE
    pool.take(own)
    before = held.tokens // PAGE if held else 0
    node = pool.publish(adapter, prefix, held)
    own -= (node.tokens // PAGE if node else 0) - before
    pool.give(own)
    pool.drop(node)
    return node, own


class Naive:
    """The cache as a list of paths, the least recently used first. A path: (content of the adapter, contents...)."""

    def __init__(self):
        self.tokens: dict[tuple, int] = {}

    def match(self, adapter: int, prefix, limit: int) -> int:
        path, tokens, found = (TWINS[adapter].digest if adapter >= 0 else "",), 0, 0
        for content, length in prefix:
            path, tokens = (*path, content, length), tokens + length
            if path not in self.tokens or tokens >= limit:
                break
            found = tokens
        return found

    def publish(self, adapter: int, prefix) -> None:
        path, tokens = (TWINS[adapter].digest if adapter >= 0 else "",), 0
        for content, length in prefix:
            path, tokens = (*path, content, length), tokens + length
            self.tokens[path] = tokens


LENGTHS = {0: 9, 1: 4, 2: 6}
PREFIXES = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(lambda c: tuple((x, LENGTHS[x]) for x in c))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(-1, 2), PREFIXES, st.integers(1, 25)), max_size=25))
def test_match_equals_a_naive_cache(asked):
    pool, naive = pool_of(10_000), Naive()
    for adapter, prefix, limit in asked:
        node = pool.match(adapter, prefix, limit)
        assert (node.tokens if node else 0) == naive.match(adapter, prefix, limit)
        compute(pool, adapter, prefix)
        naive.publish(adapter, prefix)
        assert pool.check() == []
        assert pool.kv == 0
        assert pool.cached == pool.reclaimable == len_in_pages(naive)


def len_in_pages(naive: Naive) -> int:
    """Whole pages of all paths, each counted behind its parent."""
    return sum(tokens // PAGE - naive.tokens.get(path[:-2], 0) // PAGE for path, tokens in naive.tokens.items())


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(-1, 2), PREFIXES, st.booleans(), st.integers(0, 20)), max_size=30))
def test_pages_conserve_under_pressure(asked):
    """Prefixes are held, dropped and pushed out by a pool of 20 pages; what is held is never pushed out."""
    pool, held = pool_of(20), []
    for adapter, prefix, keep, take in asked:
        tokens = sum(length for _, length in prefix)
        node = pool.match(adapter, prefix, tokens + 1)
        if keep and node is not None:
            pool.hold(node)
            held.append((adapter, prefix, node))
        elif held and not keep:
            pool.drop(held.pop(0)[2])
        elif -(-(tokens + 1) // PAGE) <= pool.free:
            compute(pool, adapter, prefix)
        pages = min(take, pool.free)
        pool.take(pages)
        assert pool.check() == []
        pool.give(pages)
        for other, path, kept in held:
            assert pool.match(other, path, 10_000) is not None
            assert pool.is_live(kept)
    assert pool.unused + pool.cached == pool.pages


def test_prefixes_are_keyed_by_the_adapters_content_and_by_the_whole_path():
    pool = pool_of()
    image, text = (7, 8), (9, 4)
    compute(pool, 0, (image, text))
    assert pool.match(0, (image, text), 99).tokens == 12
    assert pool.match(1, (image, text), 99).tokens == 12  # equal weights under another name
    assert pool.match(2, (image, text), 99) is None  # other weights
    assert pool.match(-1, (image, text), 99) is None  # no adapter
    assert pool.match(0, (text,), 99) is None  # the same text behind nothing
    assert pool.match(0, (image, (5, 4)), 99).tokens == 8
    assert pool.match(0, (image, text), 12).tokens == 8  # at least one token is left to compute


def test_a_segment_that_was_cut_is_another_one():
    """--clip keeps the key of the segment that it cuts: a shorter prompt must not get more than it has."""
    pool = pool_of()
    compute(pool, 0, ((7, 8), (9, 12)))
    assert pool.match(0, ((7, 8), (9, 5)), 99).tokens == 8
    compute(pool, 0, ((7, 8), (9, 5)))
    assert [pool.match(0, ((7, 8), (9, length)), 99).tokens for length in (12, 5, 6)] == [20, 13, 8]
    assert not pool.check()


def test_the_least_recently_used_prefix_goes_first_and_a_parent_after_its_children():
    pool = pool_of(12)
    for content in (1, 2, 3):
        compute(pool, -1, ((content, 8),))
    compute(pool, -1, ((1, 8), (4, 8)))  # uses 1, and hangs 4 behind it
    assert (pool.unused, pool.reclaimable) == (4, 8)
    pool.take(5)
    assert [pool.match(-1, ((content, 8),), 99) is not None for content in (1, 2, 3)] == [True, False, True]
    pool.take(3)
    assert [pool.match(-1, ((content, 8),), 99) is not None for content in (1, 2, 3)] == [True, False, False]
    pool.take(2)
    assert pool.match(-1, ((1, 8), (4, 8)), 99).tokens == 8  # the child went, the parent is left
    assert pool.check() == []


def test_a_pool_without_a_prefix_cache_forgets():
    pool = pool_of(prefix_cache=False)
    node, own = compute(pool, 0, ((1, 8),))
    assert (node, own, pool.match(0, ((1, 8),), 99), pool.cached) == (None, 3, None, 0)


def test_adapters_and_prefixes_share_the_pages():
    pool = pool_of(8)
    compute(pool, -1, ((1, 16),))
    assert (pool.unused, pool.free) == (4, 8)
    pool.start_load(2)
    pool.start_load(0)
    assert (pool.unused, pool.free, pool.cached) == (2, 2, 0)  # the idle prefix gave way
    pool.finish_load(2)
    pool.evict(2)
    assert pool.check() == []
    assert pool.free == 6

"""One line of progress on stderr, rewritten in place on a terminal; nothing elsewhere. It knows counts only."""

from __future__ import annotations

import sys
import time


class Progress:
    """A context around one replay of `total` requests. mode: "auto" (only on a terminal) or "off"."""

    def __init__(self, label: str, total: int, mode: str):
        self._label, self._total = label, total
        self._shown = mode == "auto" and sys.stderr.isatty()
        self._began = self._last = time.monotonic()
        self._tokens = 0

    def update(self, ended: int, tokens: int) -> None:
        """`ended` requests have ended, and `tokens` more tokens came out."""
        self._tokens += tokens
        now = time.monotonic()
        if self._shown and now - self._last >= 0.5:
            rate = self._tokens / (now - self._began)
            line = f"{self._label}: {ended}/{self._total} requests, {rate:,.0f} tokens/s, {now - self._began:.0f} s"
            print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
            self._last = now

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self._shown:
            print("\r" + " " * 78 + "\r", end="", file=sys.stderr, flush=True)

"""Progress on stderr: a bar with rate and time left on a terminal, nothing elsewhere unless asked. Never on stdout."""

from __future__ import annotations

import sys


class Progress:
    """A context around one replay of `total` requests. mode: "auto" (only on a terminal) or "off"."""

    def __init__(self, label: str, total: int, mode: str):
        self._bar = None
        if mode == "auto" and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, unit="req", file=sys.stderr, leave=False)

    def update(self, finished: int) -> None:
        """Show that `finished` requests have ended."""
        if self._bar is not None:
            self._bar.update(finished - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.close()

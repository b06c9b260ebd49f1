"""The folder that a campaign fills: one results directory a replay, which grows by a policy whenever a cell is over.

Each cell's record keeps the options that made it, the device's name and the hash of both (`config["campaign"]`); a cell
whose record has its hash is done. The hash does not hold the program's version, the contents of adapters from files, or the
profile that policies predict with by default, which gets better while a campaign goes on; the record names the latter.
A process killed at any moment leaves the records of all finished cells. It runs nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from engine.campaign_file import CampaignError, Cell
from traces.record import RunResult, summarize
from traces.result_files import ResultError, read_results, read_summary, write_results

LEFT_OVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>partial|former)")
"""What a process killed while it wrote a results directory leaves beside it (`traces.result_files`)."""


class Records:
    """The folder, opened by one process at a time; a context manager. Raises CampaignError and ResultError."""

    def __init__(self, directory: str | Path):
        self.path = Path(directory)

    def __enter__(self) -> Records:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise CampaignError(f"{self.path}: another process fills it; wait for it, or name another --output") from None
        for left in sorted(self.path.iterdir()):
            if found := LEFT_OVER.fullmatch(left.name):
                if found["kind"] == "former" and not (self.path / found["name"]).exists():
                    os.replace(left, self.path / found["name"])
                else:
                    shutil.rmtree(left)
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._lock)

    def entries(self, cell: Cell) -> dict[str, dict]:
        """What the folder knows under a cell's replay, by policy. ResultError for a folder that no campaign filled."""
        folder = self.path / cell.replay
        if not folder.is_dir() or not any(folder.iterdir()):
            return {}
        found = read_summary(folder)["policies"]
        if any("campaign" not in entry["config"] for entry in found.values()):
            raise ResultError(f"{folder}: holds results that no campaign made; name another --output")
        return found

    def done(self, cell: Cell, device: str) -> bool:
        """True if the cell has a record of its options on this device. CampaignError where its replay has one of others."""
        ours, found = cell.stamp(device), self.entries(cell)
        for policy, entry in found.items():
            stamp = entry["config"]["campaign"]
            changed = _changes(stamp, ours, policy == cell.policy.name)
            if changed:
                raise CampaignError(
                    f"{cell.replay}/{policy}: there is a record of other options ({'; '.join(changed)}); name another "
                    "--output, or --overwrite it"
                )
        return cell.policy.name in found

    def keep(self, cell: Cell, result: RunResult, adapters: Sequence[str], goodput: Mapping[str, float],
             order: Iterable[str], device: str) -> Path:  # fmt: skip
        """Add a cell's record to its replay's; the folder. Records of other options of the same replay go."""
        ours = result.config["campaign"] = cell.stamp(device)
        folder = self.path / cell.replay
        kept = [policy for policy, entry in self.entries(cell).items()
                if policy != cell.policy.name and not _changes(entry["config"]["campaign"], ours, False)]  # fmt: skip
        own = [run for run in read_results(folder) if run.policy in kept] if kept else []
        places = {policy: number for number, policy in enumerate(order)}
        runs = sorted([*own, result], key=lambda run: places.get(run.policy, len(places)))
        return write_results(folder, runs, {run.policy: summarize(run, goodput) for run in runs}, adapters, overwrite=True)


def _changes(stamp: Mapping, ours: Mapping, with_policy: bool) -> list[str]:
    """What differs between two cells' options and devices, in words."""
    was, now = ({"device": s["device"], **s["options"]} for s in (stamp, ours))
    names = [name for name in {**was, **now} if with_policy or name != "policy"]
    return [f"{name} {was.get(name)!r} is now {now.get(name)!r}" for name in names if was.get(name) != now.get(name)]

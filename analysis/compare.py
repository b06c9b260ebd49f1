"""Results of several policies, or of several runs, side by side: from their summary files alone.

It reads what was summarised when the results were written; metrics are not computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from traces.record import per_adapter
from traces.result_files import read_results, read_summary
from traces.result_tables import render_per_adapter, render_table


def labels(directories: Sequence[str], short: bool = False) -> dict[tuple[str, str], str]:
    """A label for each (directory, policy): the policy, and where that is ambiguous, policy@directory; short: only the last
    part of the directory's path, where that tells them apart."""
    names = {directory: Path(directory).name if short else directory for directory in directories}
    if len(set(names.values())) < len(names):
        names = dict(zip(directories, directories, strict=True))
    runs = [(directory, policy) for directory in directories for policy in read_summary(directory)["policies"]]
    times = Counter(policy for _, policy in runs)
    return {(place, policy): policy if times[policy] == 1 else f"{policy}@{names[place]}" for place, policy in runs}


def summaries(directories: Sequence[str], short: bool = False) -> dict[str, dict]:
    """Summaries by label, with what was left out of the files as notes. Raises ResultError."""
    found = {}
    documents = {directory: read_summary(directory) for directory in directories}
    for (directory, policy), label in labels(directories, short).items():
        entry = documents[directory]["policies"][policy]
        run = entry["summary"]["run"]
        found[label] = entry["summary"] | {"run": run | {"notes": [*run["notes"], *entry.get("notes", ())]}}
    return found


def comparison(directories: Sequence[str], with_adapters: bool = False) -> str:
    """The text that the simulator prints, from files. with_adapters: a table of the adapters of each run follows."""
    parts = [render_table(summaries(directories))]
    if with_adapters:
        names = labels(directories)
        for directory in directories:
            adapters = read_summary(directory)["adapters"]
            for result in read_results(directory):
                label = names[directory, result.policy]
                parts.append(render_per_adapter(per_adapter(result, adapters), label))
    return "\n".join(parts)

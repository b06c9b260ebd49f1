"""What every replay does with its results: files first, then tables on stdout. Shared by simulator and engine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from traces import result_files, result_tables
from traces.record import RunResult, per_adapter, summarize


def publish(results: Sequence[RunResult], adapters: Sequence[str], goodput: Mapping[str, float], *, output: str | None,
            overwrite: bool, with_adapters: bool) -> None:
    """Write `results` into the directory `output`, if there is one, and print their comparison.

    adapters: names by index. with_adapters: a table by adapter of each policy as well. Raises ResultError.
    """
    summaries = {result.policy: summarize(result, goodput) for result in results}
    if output:
        result_files.write_results(output, results, summaries, adapters, overwrite)
    sys.stdout.write(result_tables.render_table(summaries))
    if with_adapters:
        for result in results:
            sys.stdout.write("\n" + result_tables.render_per_adapter(per_adapter(result, adapters), result.policy))
    sys.stdout.flush()

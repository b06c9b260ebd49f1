"""How far a simulated number may be trusted, by the scatter of its own profile.

The same trace is replayed twice more, with every table at the fast and at the slow end of its scatter (`profile.shifted`);
what the headline numbers become is their error bar. That is more than repeats of one step would do to a mean, which average
out: it stands for a day on which everything is that much faster or slower. It knows nothing of errors that no scatter has: a
cost that the model does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from policies import Policy
from policies.profile import Profile, shifted
from sim.cluster import SimConfig, simulate
from traces.record import HEADLINES, RunResult, summarize
from traces.request import Trace


def add_error_bars(run: RunResult, trace: Trace, policy: Policy, profile: Profile, config: SimConfig,
                   goodput: Mapping[str, float]) -> None:  # fmt: skip
    """Write {metric: [lowest, highest]} of HEADLINES into the run's configuration, where the profile has a scatter."""
    if not profile.scatter:
        return
    quiet = replace(config, keep_steps=False, check_invariants=False)
    found = [summarize(run, goodput)]
    found += [summarize(simulate(trace, policy, shifted(profile, side), quiet), goodput) for side in (0, 1)]
    bars = {}
    for name in HEADLINES:
        values = [summary[name] for summary in found]
        if None not in values:
            bars[name] = [min(values), max(values)]
    run.config["error_bars"] = bars

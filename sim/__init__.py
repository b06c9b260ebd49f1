"""The simulator: advances the shared ledger and policies with modelled latencies instead of a GPU."""

"""Measured and analytic latency tables; data with a provenance header, read by name."""

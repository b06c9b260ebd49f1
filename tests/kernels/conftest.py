"""Where there is no GPU, Triton must learn that it is to interpret before any test module imports it."""

import kernels.target  # noqa: F401

"""What the trainings of these tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """Small models train fastest on one core, and the same on any number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

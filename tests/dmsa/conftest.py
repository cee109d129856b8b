"""What tests of runs share."""

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""What all tests share: one thread a process, so that two cores are not fought over."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)

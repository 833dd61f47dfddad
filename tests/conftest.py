"""Every test runs on one thread, from a fixed seed, and without the network."""

from __future__ import annotations

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, and for the processes that tests start
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, for ages where cores are shared


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

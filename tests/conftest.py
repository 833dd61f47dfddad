"""Every test runs on one thread, from a fixed seed, and without the network."""

from __future__ import annotations

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, and for the processes that tests start
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.pop("FORCE_COLOR", None)  # tests say themselves what a terminal can do

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
torch.set_num_threads(1)  # tiny tensors: a second thread only waits, for ages where cores are shared


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)

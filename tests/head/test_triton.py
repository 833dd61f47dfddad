"""The Triton kernel, run by Triton's interpreter on a CPU, against the torch blocks and the textbook.

The interpreter is chosen when the kernel is first imported, so a process of its own runs all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_under_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, str(CASES)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("all cases passed")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_without_a_gpu_it_says_so() -> None:
    import torch

    from nextoken.head import Head, statistics

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        pytest.skip("the kernel would run here")
    with pytest.raises(ValueError, match="needs a CUDA device"):
        statistics(torch.randn(2, 4), Head(torch.randn(5, 4)), impl="triton")
    with pytest.raises(ValueError, match="float64"):
        statistics(torch.randn(2, 4).double(), Head(torch.randn(5, 4)), impl="triton")
    with pytest.raises(ValueError, match="at most 64"):
        statistics(torch.randn(2, 4), Head(torch.randn(500, 4)), impl="triton", top=65)

"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before the import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=[pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The interpreter's CPU, or the GPU; the same test runs on either."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels were compiled for the GPU; TRITON_INTERPRET=1 runs them on the CPU")
    return torch.device(request.param)

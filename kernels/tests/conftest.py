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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The fused path needs tensor cores: on a card without them its tests are skipped, not failed."""
    try:
        return (yield)
    except ValueError as error:
        if "path: fused given for device cuda" in str(error) and torch.cuda.get_device_capability() < (8, 0):
            pytest.skip(str(error))
        raise

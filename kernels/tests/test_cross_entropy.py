"""The loss under a frozen head: torch's own values and gradients, pieces, extreme logits, bad input."""

import pytest
import torch
import torch.nn.functional as F
from qmedtune_kernels import cross_entropy
from qmedtune_kernels.cross_entropy import frozen_head_nll

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
PATHS = ("reference", "triton")


def inputs(dtype: torch.dtype, device, tokens: int = 7, width: int = 32, vocabulary: int = 301):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(device, dtype) for n in (tokens, vocabulary))
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    return hidden, weight * 0.2, targets


def exact(hidden, weight, targets, scale):
    wide = hidden.detach().double().requires_grad_()
    loss = F.cross_entropy(wide @ weight.double().t(), targets, reduction="none")
    (loss * scale).sum().backward()
    return loss.detach(), wide.grad


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize("vocabulary", [2, 301, 5000])
def test_losses_and_gradients_are_those_of_cross_entropy(dtype, path, vocabulary, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 3 * vocabulary)  # three rows a piece
    monkeypatch.setattr(cross_entropy, "GPU_LOGITS", 3 * vocabulary)
    hidden, weight, targets = inputs(dtype, device, vocabulary=vocabulary)
    scale = torch.rand(len(hidden), device=device) + 0.5
    leaf = hidden.clone().requires_grad_()
    losses = frozen_head_nll(leaf, weight, targets, path)
    (losses * scale).sum().backward()
    wanted, gradient = exact(hidden, weight, targets, scale)
    assert losses.dtype == torch.float32 and leaf.grad.dtype == dtype
    for actual, expected in ((losses, wanted), (leaf.grad, gradient)):
        assert (actual.double() - expected).norm() <= LIMITS[dtype] * expected.norm()


@pytest.mark.parametrize("path", PATHS)
def test_logits_far_apart_give_finite_losses(path, device):
    hidden, weight = torch.tensor([[1.0], [-1.0]], device=device), torch.tensor([[3e4], [0.0], [-3e4]], device=device)
    targets = torch.tensor([2, 0], device=device)
    leaf = hidden.clone().requires_grad_()
    losses = frozen_head_nll(leaf, weight, targets, path)
    losses.sum().backward()
    assert losses.tolist() == [6e4, 6e4] and leaf.grad.tolist() == [[6e4], [-6e4]]


def test_small_gradients_of_fp16_are_rounded_once(device):
    hidden, weight, targets = inputs(torch.float16, device)
    leaf = hidden.clone().requires_grad_()
    (frozen_head_nll(leaf, weight, targets).sum() * 1e-5).backward()  # 1e-5 itself is subnormal in fp16
    _, gradient = exact(hidden, weight, targets, 1e-5)
    assert (leaf.grad.double() - gradient).norm() <= 0.01 * gradient.norm()


def test_without_a_gradient_one_product_is_made(monkeypatch):
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or real(*a, **k))
    hidden, weight, targets = inputs(torch.float32, "cpu")
    frozen_head_nll(hidden, weight, targets, "reference")
    assert not calls  # the gradient's
    frozen_head_nll(hidden.requires_grad_(), weight, targets, "reference")
    assert len(calls) == 1


def test_no_tokens_no_loss(device):
    hidden, weight, targets = inputs(torch.bfloat16, device, tokens=0)
    leaf = hidden.requires_grad_()
    losses = frozen_head_nll(leaf, weight, targets)
    losses.sum().backward()
    assert losses.shape == (0,) and leaf.grad.shape == hidden.shape


def test_misfits_are_named():
    hidden, weight, targets = inputs(torch.float32, "cpu")
    for bad in (
        (hidden, weight[:, :-1], targets), (hidden, weight.bfloat16(), targets), (hidden, weight, targets[:-1]),
        (hidden.double(), weight.double(), targets), (hidden, weight.clone().requires_grad_(), targets),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^hidden, weight, targets: given .*; allowed"):
            frozen_head_nll(*bad)

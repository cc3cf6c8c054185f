"""The residual add in one kernel with the next norm: the bits of doing one after the other, whatever stands between."""

import copy

import pytest
import torch
from small_llama import assert_close, step, tiny

from qmedtune.modeling import activations, fused, residual


@pytest.fixture
def ids():
    return torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(1))


def layers_of(model):
    return model.base_model.model.model.layers


def installed(joined: bool, **options):
    """A model of three layers with our forwards; not `joined`: each sum is made before it is normed."""
    model = tiny(num_hidden_layers=3, **options)
    fused.install(model)
    if not joined:
        for layer in layers_of(model):
            del layer.following
    return model.train()


@pytest.fixture
def normed(monkeypatch):
    """Names of what was called to norm rows at the beginning of a layer or behind the last one."""
    called = []
    for module, name in ((fused, "rms_norm"), (residual, "add_rms_norm")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: called.append(name) or real(*a))
    return called


@pytest.mark.parametrize("trained_norms", [False, True])
def test_loss_and_gradients_are_the_bits_of_one_after_the_other(ids, normed, trained_norms):
    found = []
    for joined in (True, False):
        model = installed(joined)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.requires_grad_(trained_norms)
        normed.clear()
        found.append(step(model, ids))
        three_sums = ["rms_norm", "add_rms_norm", "add_rms_norm", "add_rms_norm"]
        assert normed == (three_sums if joined else 4 * ["rms_norm"])
    (loss, grads), (plain_loss, plain_grads) = found
    assert loss == plain_loss and grads.keys() == plain_grads.keys()
    assert any("norm" in name for name in grads) == trained_norms
    assert all(torch.equal(grads[name], value) for name, value in plain_grads.items())


def test_gradients_in_bf16_are_as_close_to_fp32(ids):
    """One rounding fewer: the norm's gradient and the sum's are added before it."""
    _, exact = step(installed(False), ids)
    errors = {}
    for joined in (True, False):
        _, grads = step(installed(joined, dtype=torch.bfloat16), ids)
        squares = sum((grads[name] - value).square().sum() for name, value in exact.items())
        errors[joined] = float(squares / sum(value.square().sum() for value in exact.values())) ** 0.5
    assert errors[True] <= 1.05 * errors[False] <= 0.05


def replaces(_, __, output):
    return 2 * output


def writes_into(_, __, output):
    output.mul_(2)


@pytest.mark.parametrize("hook", [replaces, writes_into])
def test_a_hook_that_changes_the_sum_is_seen_by_the_next_norm(ids, hook):
    found = []
    for joined in (True, False):
        model = installed(joined)
        layers_of(model)[1].register_forward_hook(hook)
        found.append(step(model, ids))
    (loss, grads), (plain_loss, plain_grads) = found
    assert loss == plain_loss != step(installed(True), ids)[0]
    assert_close(grads, plain_grads, 1e-6)


def test_recomputed_layers_norm_for_themselves(ids, normed):
    model = installed(True)
    activations.set_ways(model, {"recompute": 1, "keep": 2})
    normed.clear()
    loss, _ = step(model, ids)
    # The first layer's twice and the second's, as the first returns its sum alone; the third's and the last are given.
    assert sorted(normed) == 2 * ["add_rms_norm"] + 3 * ["rms_norm"]
    assert loss == step(installed(False), ids)[0]


def test_nothing_is_prepared_without_gradients_or_left_behind(ids, normed):
    model = installed(True)
    step(model, ids)
    assert all(getattr(module, "prepared", None) is None for module in model.modules())
    normed.clear()
    with torch.no_grad():
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    assert normed == 8 * ["rms_norm"]


def test_a_copy_prepares_for_its_own_norms_and_the_state_dict_stays(ids):
    model = installed(True)
    again = copy.deepcopy(model)
    assert layers_of(again)[0].following[0] is layers_of(again)[1].input_layernorm
    assert layers_of(again)[2].following[0] is again.base_model.model.model.norm
    assert again.state_dict().keys() == tiny(num_hidden_layers=3).state_dict().keys()
    assert float(step(again, ids)[0]) == pytest.approx(float(step(model, ids)[0]), rel=1e-6)

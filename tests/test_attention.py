"""Attention by document lengths: equal to a mask, nothing leaks, and what it cannot do is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qmedtune.errors import RecipeError
from qmedtune.modeling import attention, cpu_attention
from qmedtune.modeling.loss import token_nll
from qmedtune.planning import memory
from qmedtune.planning.numerics import check_attention
from qmedtune.results import Attention, Kernels

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def models():
    """The same random LLaMA with a mask and with lengths."""
    torch.manual_seed(0)
    masked = LlamaForCausalLM(LlamaConfig(**CONFIG))
    by_length = copy.deepcopy(masked)
    masked.set_attn_implementation("sdpa")
    by_length.set_attn_implementation(attention.NAME)
    return masked, by_length


def positions_of(lengths):
    """int64 [tokens] of a row that holds documents of these lengths."""
    return torch.cat([torch.arange(length) for length in lengths])


@pytest.fixture
def rows():
    """Two rows of three and two documents; the second row ends in padding, which is a document of its own."""
    positions = torch.stack([positions_of((7, 1, 16)), positions_of((10, 14))])
    ids = torch.randint(0, 101, positions.shape, generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[1, 10:] = -100
    return ids, labels, positions


def test_bounds_are_where_documents_start(rows):
    bounds, longest = attention.document_bounds(rows[2])
    assert bounds.tolist() == [0, 7, 8, 24, 34, 48] and bounds.dtype == torch.int32 and longest == 16
    cut = torch.tensor([[3, 4, 5, 0], [6, 7, 2, 3]])  # pieces of documents whose positions go on
    assert attention.document_bounds(cut)[0].tolist() == [0, 3, 4, 6, 8]


def test_loss_and_gradients_equal_those_of_a_mask(models, rows):
    found = []
    for model in models:
        loss = token_nll(model, *rows)
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (masked, masked_grads), (by_length, grads) = found
    torch.testing.assert_close(by_length, masked, rtol=1e-6, atol=1e-5)
    for name, grad in masked_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


def test_packages_are_looked_up_once_for_all_layers(monkeypatch):
    """On a GPU each layer and pass asks whether FlashAttention is there: a look-up on the disk takes as long as 24
    small operations. The tensors only say that they are on one; torch's own kernel is not reached."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    asked, reached = [], []
    monkeypatch.setattr(attention, "find_spec", asked.append)
    monkeypatch.setattr(attention, "_torch", lambda query, *_: reached.append(query.shape) or query)
    attention._has_flash.cache_clear()
    rows = torch.zeros(1, 2, 4, 8).as_subclass(OnGpu)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    for _ in range(32):
        attention.varlen(None, rows, rows, rows, None, cu_seq_lens_q=bounds, max_length_q=4)
    attention._has_flash.cache_clear()
    assert len(reached) == 32 and asked == ["flash_attn"]


def older_kernel(query, key, value, bounds, *_, scale=None, window_size=(-1, -1)):
    """torch's kernel before 2.12 by its parameters, on a CPU: it takes as many heads of keys as of queries."""
    assert window_size == (-1, 0) and key.shape == value.shape == query.shape
    return attention._per_document(query, key, value, attention.Documents(bounds, 0, scale))


def newer_kernel(query, key, value, bounds, *_, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert window_size == (-1, 0) and enable_gqa == (key.shape[1] != query.shape[1])
    return attention._per_document(query, key, value, attention.Documents(bounds, 0, scale))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_an_older_torch_is_given_keys_repeated_with_the_same_results(kv_heads, monkeypatch):
    """From 2.12 on they are given as they are: at 32 heads and 8 of keys, repeated ones take four times the memory."""
    generator = torch.Generator().manual_seed(kv_heads)
    leaves = [torch.randn(9, heads, 8, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    bounds, dy = torch.tensor([0, 2, 9], dtype=torch.int32), torch.randn(9, 4, 8, generator=generator)
    found = {}
    for kernel in (older_kernel, newer_kernel):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        attention._takes_groups.cache_clear()
        output = attention._torch(*leaves, attention.Documents(bounds, 7, None))
        found[kernel] = [output, *torch.autograd.grad(output, leaves, dy)]
    attention._takes_groups.cache_clear()
    for older, newer in zip(found[older_kernel], found[newer_kernel], strict=True):
        torch.testing.assert_close(older, newer, rtol=1e-5, atol=1e-6)


def test_the_plan_knows_as_the_trainer_does_whether_keys_are_repeated():
    memory.varlen_repeats.cache_clear()
    if not attention._has_flash():
        assert memory.varlen_repeats() == (not attention._takes_groups())


@pytest.mark.parametrize("training", [True, False])
def test_no_document_sees_another(models, rows, training):
    model = models[1].train(training)
    ids, _, positions = rows
    perturbed = ids.clone()
    perturbed[0, :7] = (perturbed[0, :7] + 1) % 101
    before, after = (model(input_ids=x, position_ids=positions, use_cache=False).logits for x in (ids, perturbed))
    assert torch.equal(before[0, 7:], after[0, 7:]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :7], after[0, :7])


def test_without_bounds_they_come_from_the_positions(models, rows):
    ids, _, positions = rows
    masked, by_length = (m.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits for m in models)
    torch.testing.assert_close(by_length, masked, rtol=1e-4, atol=1e-5)


def test_masks_and_caches_are_refused(models, rows):
    model = models[1].eval()
    with pytest.raises(RecipeError, match="it was given a mask\ntake attention: sdpa"):
        mask = torch.ones(2, 1, 24, 24, dtype=torch.bool)
        model(input_ids=rows[0], attention_mask=mask, use_cache=False)
    with pytest.raises(RecipeError, match="it was given a cache"):
        model.generate(input_ids=rows[0][:1], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "message"),
    [
        ("flash_attention_2", None, "bfloat16", "it needs a GPU"),
        ("flash_attention_2", 9.0, "bfloat16", "package is not installed"),
        ("varlen", 7.5, "float16", "compute capability 7.5"),
        ("varlen", 9.0, "float32", "compute_dtype: float32"),
    ],
)
def test_an_attention_that_cannot_run_here_is_named_with_what_can(name, capability, dtype, message):
    with pytest.raises(RecipeError, match=f"(?s)model.attention: {name} given.*{message}.*\nallowed here: .*sdpa"):
        check_attention(name, capability, dtype)


def test_an_attention_that_can_run_is_let_through():
    check_attention("varlen", 8.0, "bfloat16")
    check_attention("varlen", None, "float32")
    check_attention("sdpa", 7.5, "float32")


def test_what_a_gpu_could_do_faster_stands_in_the_report(monkeypatch):
    from qmedtune import model as models

    broken = "reference: the first kernel did not run (RuntimeError: PTX JIT failed)"
    kernels, masked = Kernels(mode="auto", paths={"lora": broken, "rope": broken}), Attention(name="sdpa", why="a mask")
    assert models.fallbacks(kernels, masked) == [] == models.fallbacks(None, masked)
    monkeypatch.setattr(models, "device", lambda: torch.device("cuda"))
    assert models.fallbacks(kernels, masked) == [f"kernels: {broken}", "attention: sdpa (a mask)"]
    asked = Kernels(mode="reference", paths={"lora": "reference: asked for"})
    assert models.fallbacks(asked, Attention(name="varlen", why="")) == []


# ----------------------------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [((200,),), ((64, 1, 63), (128,)), ((5, 120, 70), (195,)), ((1,), (1,))])
def test_blocks_of_queries_attend_as_a_mask_in_float64_would(lengths, dtype):
    positions = torch.stack([positions_of(row) for row in lengths])
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), 6, positions.shape[1], 16)
    query, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    key, value = (torch.randn(shape[0], 2, *shape[2:], generator=generator).to(dtype) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    output = cpu_attention.attend(*leaves, cpu_attention.blocks_of(positions), scale=0.3)
    output.backward(gradient)
    wide = [x.double().requires_grad_() for x in (query, key, value)]
    document = (positions == 0).cumsum(1)
    index = torch.arange(positions.shape[1])
    mask = (document[:, :, None] == document[:, None]) & (index[:, None] >= index)
    wanted = F.scaled_dot_product_attention(*wide, attn_mask=mask[:, None], scale=0.3, enable_gqa=True)
    wanted.backward(gradient.double())
    limit = 1e-5 if dtype == torch.float32 else 6e-3
    for actual, expected in ((output, wanted), *((a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))):
        assert (actual.double() - expected).norm() <= limit * expected.norm() + 1e-12


def test_blocks_read_no_keys_of_documents_that_ended():
    positions = torch.cat([torch.arange(300), torch.arange(100)])[None]
    blocks = cpu_attention.blocks_of(positions)
    firsts = {block.start: block.first for block in blocks}
    assert firsts == {0: 0, 64: 0, 128: 0, 192: 0, 256: 0, 320: 300, 384: 300}
    assert all(block.hidden.shape[-1] <= cpu_attention.BLOCK for block in blocks if block.start not in (256,))

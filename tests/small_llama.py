"""Small random LLaMAs with adapters, to test what the kernels replace; loss and gradients of one step of them."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64,
}  # fmt: skip


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32, embeddings: bool = False, **config):
    """A random LLaMA with a random r=4 adapter on all linears, fp32 masters, frozen weights in `dtype`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **config})).to(dtype)
    saved = ["embed_tokens", "lm_head"] if embeddings else None
    lora_config = LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", lora_dropout=dropout, modules_to_save=saved
    )
    model = get_peft_model(model, lora_config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def step(model, ids: torch.Tensor, **inputs):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    loss.backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss.detach(), grads


def assert_close(actual, expected, tolerance: float):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, f"{name}: {error:.2e}"

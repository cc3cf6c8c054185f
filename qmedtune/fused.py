"""Puts `qmedtune_kernels` under a loaded LLaMA: grouped q/k/v and gate/up linears with LoRA, and norms.

Only the instances of this model change class, to subclasses with another `forward`; no library is patched. Parameters,
their names and the state dict stay, so PEFT saves, loads and merges as before. What an adapter does (active, disabled,
merged, dropout) is read at every call.
Deliberately not here: loading, quantising, attention itself (transformers' attention interface), the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from qmedtune_kernels import Adapter, NF4Weight, lora
from qmedtune_kernels.rms_norm import add_rms_norm, rms_norm
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama


def install(model: nn.Module, mode: str = "auto") -> dict:
    """Put the kernels under every LLaMA module of `model` (bare or PEFT-wrapped), in place.

    Call it after attaching adapters. Returns the facts for the report: the path of each operation and the number
    of modules of each kind.
    """
    dtype = _compute_dtype(model)
    counts: Counter[str] = Counter()
    for module in list(model.modules()):
        for original, ours in REPLACED.items():
            if type(module) is original:
                module.__class__ = ours
                counts[original.__name__] += 1
        if isinstance(module, ModulesToSaveWrapper):
            _compute_in(dtype, module)
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            stack_rows([module.q_proj, module.k_proj, module.v_proj])
        elif isinstance(module, LlamaMLP):
            stack_rows([module.gate_proj, module.up_proj])
    return {"mode": mode, "modules": dict(counts)}


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """dtype of the hidden states: that of the norms, which nothing quantises or trains apart from the rest."""
    return next(module.weight.dtype for module in model.modules() if isinstance(module, llama.LlamaRMSNorm))


# --------------------------------------------------------------------- linears


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def stack_rows(projections: Sequence[nn.Module]) -> None:
    """Lay the plain frozen weights of projections that read one input behind each other in memory."""
    weights = [_base(projection).weight for projection in projections]
    if any(type(_base(projection)) is not nn.Linear or weight.requires_grad
           for projection, weight in zip(projections, weights, strict=True)):
        return
    joined = torch.cat([weight.data for weight in weights])
    start = 0
    for weight in weights:
        rows = weight.shape[0]
        weight.data = joined[start : start + rows]
        start += rows


def _adjacent(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights as one [sum N, K] view, if they still lie behind each other."""
    first = weights[0]
    end = first.data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return None
        end += weight.numel() * weight.element_size()
    rows = sum(weight.shape[0] for weight in weights)
    if first.storage_offset() + rows * first.shape[1] > first.untyped_storage().nbytes() // first.element_size():
        return None
    return first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _nf4(linear: nn.Module) -> NF4Weight:
    """The tensors of a bitsandbytes `Linear4bit` on the GPU."""
    state = linear.weight.quant_state
    nested = state.state2
    return NF4Weight(
        packed=linear.weight.data, absmax=state.absmax, blocksize=state.blocksize, shape=tuple(state.shape),
        code2=nested.code if nested else None, absmax2=nested.absmax if nested else None,
        offset=state.offset if nested else None,
    )  # fmt: skip


def _is_nf4(linear: nn.Module) -> bool:
    state = getattr(linear.weight, "quant_state", None)
    return state is not None and state.quant_type == "nf4"


def _weight(linears: Sequence[nn.Module]) -> Tensor | tuple[NF4Weight, ...] | None:
    """The stacked frozen weight of `linears`; None when they cannot be used as one."""
    if len(linears) > 1 and any(linear.bias is not None for linear in linears):
        return None
    if all(_is_nf4(linear) for linear in linears):
        return tuple(_nf4(linear) for linear in linears)
    if any(type(linear) is not nn.Linear or linear.weight.requires_grad for linear in linears):
        return None
    return linears[0].weight if len(linears) == 1 else _adjacent([linear.weight for linear in linears])


def _active(module: nn.Module) -> list[str]:
    """Names of the adapters that this layer applies now."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _ours(module: nn.Module) -> bool:
    """Whether our function may compute this layer: no hooks to run, and plain LoRA, not a variant of it."""
    if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in module.__dict__:
        return False
    if not isinstance(module, LoraLayer):
        return True
    if module.merged and module.disable_adapters:
        return False  # PEFT unmerges inside its own forward
    return not any(name in module.lora_variant or module.lora_B[name].bias is not None for name in _active(module))


def _drops(module: nn.Module) -> bool:
    return module.training and any(_dropout(module, name) for name in _active(module))


def _dropout(module: nn.Module, name: str) -> float:
    dropout = module.lora_dropout[name]
    return dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0


def linear(x: Tensor, projections: Sequence[nn.Module]) -> Tensor:
    """The projections of one x [..., K], side by side along the last dimension of the result."""
    bases = [_base(projection) for projection in projections]
    weight = _weight(bases) if all(_ours(projection) for projection in projections) else None
    if len(projections) > 1 and (weight is None or any(_drops(projection) for projection in projections)):
        return torch.cat([linear(x, [projection]) for projection in projections], dim=-1)
    if weight is None:
        return projections[0](x)
    adapters, dropped, start = [], [], 0
    for projection, base in zip(projections, bases, strict=True):
        for name in _active(projection):
            a, b = projection.lora_A[name].weight, projection.lora_B[name].weight
            adapter = Adapter(a, b, projection.scaling[name], start)
            if p := _dropout(projection, name):
                dropped.append((adapter, p))
            else:
                adapters.append(adapter)
        start += base.out_features
    y = lora.linear(x, weight, adapters, bases[0].bias)
    for adapter, p in dropped:
        y = y + lora.linear(F.dropout(x, p), None, [adapter])
    return y


# --------------------------------------------------- LLaMA's forwards (transformers 5, modeling_llama)


class LlamaRMSNorm(llama.LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LlamaMLP(llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear(x, [self.gate_proj, self.up_proj]).chunk(2, dim=-1)
        return linear(self.act_fn(gate) * up, [self.down_proj])


class LlamaAttention(llama.LlamaAttention):
    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape[:-1]
        qkv = linear(hidden_states, [self.q_proj, self.k_proj, self.v_proj]).view(*shape, -1, self.head_dim)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query, key, value = (part.transpose(1, 2) for part in qkv.split((heads, kv_heads, kv_heads), dim=2))
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        output, weights = attention(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        return linear(output.reshape(*shape, -1), [self.o_proj]), weights


class LlamaDecoderLayer(llama.LlamaDecoderLayer):
    """Keeps the original's name: FSDP wraps by it. Subclassing makes transformers add checkpointing to `forward`."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        norm = self.post_attention_layernorm
        normed, residual = add_rms_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
        return residual + self.mlp(normed)


REPLACED = {
    llama.LlamaRMSNorm: LlamaRMSNorm,
    llama.LlamaMLP: LlamaMLP,
    llama.LlamaAttention: LlamaAttention,
    llama.LlamaDecoderLayer: LlamaDecoderLayer,
}


# --------------------------------------------------------------------- trained embeddings


class MasterEmbedding(nn.Embedding):
    """A trained fp32 copy whose output is in the compute dtype."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, self.padding_idx).to(self.compute_dtype)


class MasterHead(nn.Linear):
    """A trained fp32 copy that multiplies in its input's dtype; the gradient arrives in fp32."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def _compute_in(dtype: torch.dtype, wrapper: ModulesToSaveWrapper) -> None:
    for copy in wrapper.modules_to_save.values():
        if type(copy) is nn.Embedding:
            copy.__class__, copy.compute_dtype = MasterEmbedding, dtype
        elif type(copy) is nn.Linear:
            copy.__class__ = MasterHead

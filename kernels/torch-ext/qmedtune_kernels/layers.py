"""Pure modules with only a `forward`, so that the Hub's `kernelize` can put them under existing layers.

`kernelize` swaps the forward of a model's own module: weights and attributes stay that module's.
Deliberately not here: constructors, state, anything a hub layer must not have.
"""

from torch import Tensor, nn

from .rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Forward for transformers' `LlamaRMSNorm` (attributes `weight` [D] and `variance_epsilon`)."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

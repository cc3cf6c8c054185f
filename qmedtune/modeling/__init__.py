"""How a LLaMA computes here: its forward passes, attention, fused layers, what they keep, and the loss."""

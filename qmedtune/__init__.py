"""qmedtune: an open LLaMA becomes a medical one on a single GPU, in one recipe."""

__version__ = "0.1.0"

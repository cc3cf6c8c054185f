"""The training loop's parts: trainer, loss and the modules that the kernels replace."""

"""Executes the PTX that Triton emits, on the CPU: what no interpreter of Triton's own reaches.

Written from NVIDIA's PTX ISA (9.0) alone. A launch of qmedtune_kernels is compiled for a target and run with all
threads of many blocks as lanes of numpy arrays; memory is that of the CPU tensors it was given.
What it shows: wrong addresses (bounds, alignment), values, missing barriers, waits and fences. What it does not: time,
bank conflicts, ptxas, the last bit of approximate instructions (`ex2.approx` is computed in full precision).
"""

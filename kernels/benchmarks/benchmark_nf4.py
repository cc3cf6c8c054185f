"""nf4 alone on this CUDA device; options as benchmark_all.py."""

from benchmark_all import main

main("dequantize")

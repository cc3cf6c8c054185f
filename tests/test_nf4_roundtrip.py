"""The table-driven NF4 round trip against bitsandbytes, bit for bit."""

import bitsandbytes.functional as bnb
import pytest
import torch

from qmedtune.merging.nf4_roundtrip import nearest_level, nf4_roundtrip


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape, size", [((160, 1088), 0.02), ((4096, 128), 3.0), ((3, 64), 1e-6), ((5, 34), 1.0)])
def test_equals_bitsandbytes(shape, size, dtype, double):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].sign() * size  # every value at the scale itself
    before = weight.clone()
    packed = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    assert torch.equal(nf4_roundtrip(weight, dtype, double_quantization=double), bnb.dequantize_4bit(*packed))
    assert torch.equal(weight, before)


def test_casts_to_the_compute_dtype_first():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    cast = nf4_roundtrip(weight.bfloat16(), torch.bfloat16, double_quantization=True)
    assert torch.equal(nf4_roundtrip(weight, torch.bfloat16, double_quantization=True), cast)


def test_every_float_around_every_border_and_cell_edge():
    levels = bnb.get_4bit_type("nf4", device="cpu")
    borders = (levels[:-1] + levels[1:]) / 2
    centres = torch.cat([borders, levels, torch.arange(-64, 65) / 64])
    below = above = centres
    values = [centres]
    for _ in range(200):
        below, above = below.nextafter(torch.tensor(-2.0)), above.nextafter(torch.tensor(2.0))
        values += [below, above]
    scaled = torch.cat(values).clamp(-1, 1)
    assert torch.equal(nearest_level(scaled), levels[torch.bucketize(scaled, borders)])

"""Attention example by example against PyTorch's own, in float64."""

import pytest
import torch
from torch.nn import functional as F

from metatt_scale.backbone.cpu_attention import attend_each, causal_mask
from metatt_scale.shapes import round_up
from tests.tiny import FLOAT64


@pytest.mark.parametrize("heads, key_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_each_example_gets_what_sdpa_gives(heads, key_heads, window):
    generator = torch.Generator().manual_seed(0)
    lengths, scale = (5, 1, 9, 2), 0.3
    shapes = [(heads, sum(lengths), 8), (key_heads, sum(lengths), 8), (key_heads, sum(lengths), 8)]
    inputs = [torch.randn(s, dtype=torch.float64, generator=generator, requires_grad=True) for s in shapes]
    mask = causal_mask(round_up(max(lengths)), window, torch.float64)
    found = attend_each(inputs[0], inputs[1], inputs[2], lengths, mask, scale)
    parts, start = [], 0
    for length in lengths:
        q, k, v = (x[:, start : start + length] for x in inputs)
        steps = torch.arange(length)
        distance = steps[:, None] - steps
        seen = (distance >= 0) & (distance < (window or length))
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True).transpose(0, 1))
        start += length
    expected = torch.cat(parts)
    assert torch.allclose(found, expected, rtol=FLOAT64, atol=FLOAT64)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad((out * direction).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=FLOAT64, atol=FLOAT64)
        assert other.abs().max() > 0.01 or window == 1

"""The first block's passes by coefficients, against those by maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hmn_replay.objectives.convnet_first_layer import PatchLayer
from hmn_replay.objectives.convnet_layers import MapLayer
from hmn_replay.objectives.convolution import Direct, Scratch
from tests.support import draw, make_norm


def by_maps(
    images: Tensor, w: Tensor, v: Tensor, g: Tensor, dg: Tensor, norm: nn.GroupNorm
) -> list[Tensor]:
    """Return output, gradient to the weight, and the tangents of output and images' gradient."""
    x, scratch = images.movedim(1, 3), Scratch(images)
    layer = MapLayer("0", w, norm, Direct(images.dtype, scratch), scratch)
    total, direction = layer.zeros(), layer.direction(v)
    state, output = layer.forward(x, scratch)
    results = [output.clone()]
    layer.backward(state, g, total, scratch)
    results.append(layer.weight_gradient(total))
    results.append(layer.forward_tangent(state, direction, torch.zeros_like(x)).clone())
    results.append(layer.backward_tangent(state, direction, dg).movedim(3, 1).clone())
    return results


def by_patches(
    images: Tensor,
    w: Tensor,
    v: Tensor,
    g: Tensor,
    dg: Tensor,
    norm: nn.GroupNorm,
    dtype: torch.dtype,
) -> list[Tensor]:
    scratch, memory = Scratch(images), Scratch(images)
    layer = PatchLayer(w, norm, dtype, scratch)
    total, direction = layer.zeros(), layer.direction(v)
    state, output = layer.forward(images, memory)
    results = [output.clone()]
    layer.backward(state, g, total, memory)
    results.append(layer.weight_gradient(total))
    results.append(layer.forward_tangent(state, direction).clone())
    results.append(layer.backward_tangent(state, dg))
    return results


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 6, 5), (2, 7, 8)])
def test_passes_are_those_by_maps(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    w, v = draw(5, channels, 3, 3, seed=2), draw(5, channels, 3, 3, seed=3)
    g, dg = (draw(3, height // 2, width // 2, 5, seed=s) for s in (4, 5))
    norm = make_norm(5)
    expected = by_maps(images, w, v, g, dg, norm)
    results = by_patches(images, w, v, g, dg, norm, dtype)
    assert results[0].dtype == results[2].dtype == dtype
    assert results[1].dtype == results[3].dtype == torch.double
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.shape == theirs.shape
        tolerance = 1e-10 if dtype == torch.double else 0.15
        assert float((ours - theirs).norm()) < tolerance * float(theirs.norm())


def test_a_flat_image_has_finite_statistics_in_float32() -> None:
    """Its variance is at the border alone; without padding's, rounding would be all there is."""
    images = torch.cat([torch.full((1, 3, 8, 8), 0.3), torch.zeros(1, 3, 8, 8)])
    layer = PatchLayer(
        draw(5, 3, 3, 3).float(), make_norm(5).float(), torch.float32, Scratch(images)
    )
    state, output = layer.forward(images, Scratch(images))
    assert bool(output.isfinite().all())
    torch.testing.assert_close(state.rate[1], torch.full((1, 5), 1e-5).rsqrt())

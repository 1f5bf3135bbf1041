"""The hierarchical memory, against a decoder written out with loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hmn_replay.memory.formats import NUMBER_FORMATS, PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.hierarchical import HierarchicalMemory
from hmn_replay.memory.layout import Layout
from tests.support import rounded_by_hand, same_bits, trained

MakeLayout = Callable[..., Layout]

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", NUMBER_FORMATS)

LAYOUTS: dict[str, dict[str, Any]] = {
    "square": {},
    "not divisible": {"image_shape": (1, 9, 14)},
    "stride 2": {"stride": 2, "decoder_channels": (3,)},
    "stride 8": {"stride": 8, "image_shape": (3, 12, 20), "decoder_channels": (4, 3, 2)},
}


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a 3 x 3 convolution with zero padding, as a sum over its nine taps."""
    channels, height, width = x.shape
    padded = x.new_zeros(channels, height + 2, width + 2)
    padded[:, 1:-1, 1:-1] = x
    out = bias.view(-1, 1, 1).expand(-1, height, width).clone()
    for dy, dx in itertools.product(range(3), range(3)):
        window = padded[:, dy : dy + height, dx : dx + width]
        for o, i in itertools.product(range(len(weight)), range(channels)):
            out[o] += weight[o, i, dy, dx] * window[i]
    return out


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def decoded_by_hand(memory: HierarchicalMemory, index: int) -> Tensor:
    """Return one image, in float64, from the paper's equation."""
    layout = memory.layout
    number_format = layout.number_format
    is_coded = number_format == "entropy"
    # Of coded integers; 0 stands for the step that the largest value gives.
    own_step, shared_step = (1 / 4, 1 / 16) if is_coded else (0, 0)
    c = int(memory.class_index[index])
    dataset = rounded_by_hand(memory.dataset_memory, number_format, shared_step)
    extractor = rounded_by_hand(memory.extractor_weight[c], number_format, shared_step)
    bias = rounded_by_hand(memory.extractor_bias[c], layout.bias_format)
    features = torch.stack(
        [
            sum((w * d for w, d in zip(row, dataset, strict=True)), start=b)
            for row, b in zip(extractor, bias, strict=True)
        ]
    )
    # An instance memory is rounded with the scales of its class, one a channel.
    siblings = memory.instance_memory[memory.class_index == c]
    place = int((memory.class_index[:index] == c).sum())
    instance = torch.stack(
        [
            rounded_by_hand(siblings[:, k], number_format, own_step)[place]
            for k in range(siblings.shape[1])
        ]
    )
    class_memory = rounded_by_hand(memory.class_memory[c], number_format, shared_step)
    x = torch.cat([silu(features), class_memory, instance])
    last = len(memory.decoder_weights) - 1
    for number in range(last + 1):
        step = 0.35 * math.sqrt(2 / (9 * len(x))) if is_coded else 0
        weight = rounded_by_hand(memory.decoder_weights[number], number_format, step)
        x = convolved(x, weight, rounded_by_hand(memory.decoder_biases[number], layout.bias_format))
        if number < last:
            x = silu(x)
        if number < last - 1:
            x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    channels, height, width = layout.image_shape
    image = x.new_zeros(channels, height, width)
    for k, y, z in itertools.product(range(channels), range(height), range(width)):
        image[k, y, z] = x[4 * k + 2 * (y % 2) + z % 2, y // 2, z // 2]
    return 1 / (1 + torch.exp(-image))


@every_format
@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_images_are_decoded_as_the_equation_says(
    make_layout: MakeLayout, number_format: NumberFormat, fields: dict[str, Any]
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format, **fields), [7, -3], [2, 3]))
    images, labels = memory.decode()
    assert labels.tolist() == [7, 7, -3, -3, -3]
    expected = torch.stack([decoded_by_hand(memory, index) for index in range(5)])
    assert images.shape == expected.shape == (5, *memory.image_shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[4]).abs().max()) > 0.01


def test_the_seed_gives_the_values(make_layout: MakeLayout) -> None:
    one, two, other = (HierarchicalMemory(make_layout(), [0, 1], 2, seed=s) for s in (1, 1, 2))
    assert same_bits(one.decode()[0], two.decode()[0])
    for name, value in one.named_parameters():
        if "bias" not in name:
            assert not value.equal(other.get_parameter(name))


# Coded weights of few steps may be 0, and stop what flows through them.
@pytest.mark.parametrize("number_format", PLAIN_FORMATS)
@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_reach_every_value_behind_an_image_and_no_other(
    make_layout: MakeLayout, number_format: NumberFormat, fields: dict[str, Any]
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format, **fields), [0, 1], [2, 2]))
    images = memory(torch.tensor([1]))
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(images, weights)
    gradients = {name: parameter.grad for name, parameter in memory.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert bool(gradient.isfinite().all())
        own = gradient
        if name in ("class_memory", "extractor_weight", "extractor_bias"):
            own, other = gradient[0], gradient[1]
            assert not other.any()
        if name == "instance_memory":
            own = gradient[1]
            assert not gradient[[0, 2, 3]].any()
        assert bool((own != 0).all()), name


def test_no_value_is_clipped_once_the_scales_are_up_to_date(make_layout: MakeLayout) -> None:
    memory = trained(HierarchicalMemory(make_layout("int8"), [0, 1, 2], [1, 4, 2]))
    for scale, latent in (
        (memory.dataset_scale, memory.dataset_memory),
        (memory.class_scale, memory.class_memory),
        (memory.extractor_scale, memory.extractor_weight),
        (memory.instance_scale[memory.class_index], memory.instance_memory),
    ):
        assert float((latent.detach() / scale).abs().max()) == pytest.approx(127, abs=1e-3)
    for weight, scale in zip(memory.decoder_weights, memory.decoder_scale, strict=True):
        assert float((weight.detach() / scale).abs().max()) == pytest.approx(127, abs=1e-3)
    assert memory.instance_scale.unique().numel() == 3 * 2  # one a class and channel


@every_format
def test_the_latent_values_of_one_class_move_no_other(
    make_layout: MakeLayout, number_format: NumberFormat
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format), [0, 1], [2, 3]))
    images, _ = memory.decode()
    with torch.no_grad():
        memory.instance_memory[:2] *= 5
        memory.class_memory[0] *= 5
        memory.extractor_weight[0] *= 5
    memory.update_scales()
    moved, _ = memory.decode()
    assert same_bits(moved[2:], images[2:])
    assert not moved[:2].equal(images[:2])

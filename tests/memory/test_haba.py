"""HaBa's hallucinators, against torch's own convolution and transposed convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.haba import HaBa, HaBaLayout
from tests.support import rounded_by_hand, same_bits, trained

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", PLAIN_FORMATS)

WEIGHTS = ("encoder_weight", "scale", "shift", "decoder_weight")


def decoded_by_hand(memory: HaBa, index: int) -> Tensor:
    layout = memory.layout
    group, j = divmod(index, layout.num_hallucinators)
    weight, scale, shift, last = (
        rounded_by_hand(memory.get_parameter(name)[j], layout.number_format) for name in WEIGHTS
    )
    bias = rounded_by_hand(memory.encoder_bias[j], layout.bias_format)
    last_bias = rounded_by_hand(memory.decoder_bias[j], layout.bias_format)
    x = rounded_by_hand(memory.bases[group], layout.number_format, scale=0.5 / 127)
    x = scale * F.conv2d(x[None], weight, bias) + shift
    # The kernel of a transposed convolution is that of a convolution, turned around.
    x = F.conv_transpose2d(x, last.flip(2, 3).transpose(0, 1), last_bias)
    return (x[0] + 0.5).clamp(0, 1)


@every_format
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14)])
@pytest.mark.parametrize("count", [1, 4])
def test_images_are_bases_through_hallucinators(
    number_format: NumberFormat, shape: tuple[int, int, int], count: int
) -> None:
    layout = HaBaLayout(shape, number_format, count)
    memory = trained(HaBa(layout, [7, -3], [count, 2 * count]), std=0.1)
    images, _ = memory.decode()
    expected = torch.stack([decoded_by_hand(memory, index) for index in range(3 * count)])
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[-1]).abs().max()) > 0.1


def test_a_hallucinator_of_cifar_has_the_papers_5568_floats() -> None:
    layout = HaBaLayout((3, 32, 32), "float32")
    assert layout.num_hallucinators == 5
    assert layout.num_floats(1, 0) == 5 * 5568
    assert layout.num_floats(10, 50) == 5 * 5568 + 10 * 3072
    memory = HaBa(layout, [0], 5)
    of_one = [p[0].numel() for name, p in memory.named_parameters() if name != "bases"]
    assert sum(of_one) == 5568


def test_there_are_as_many_hallucinators_as_leave_room_for_a_basis_a_class() -> None:
    counts = []
    for num_bytes in (120_000, 55_000, 50_000, 45_000, 40_000):
        layout = HaBaLayout.choose(num_bytes, (3, 32, 32), 10)
        assert layout.max_images(num_bytes, 10) >= 10 * layout.num_hallucinators
        counts.append(layout.num_hallucinators)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 5
    assert counts[-1] == 1
    for num_bytes in (45_000, 50_000, 55_000):
        chosen = HaBaLayout.choose(num_bytes, (3, 32, 32), 10).num_hallucinators
        if chosen < 5:
            with pytest.raises(BudgetError):
                HaBaLayout((3, 32, 32), "int8", chosen + 1).max_images(num_bytes, 10)


@pytest.mark.parametrize("count", [0, 65, -1])
def test_a_number_of_hallucinators_out_of_range_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"num_hallucinators is 1 to 64; got {count}"):
        HaBaLayout((3, 8, 8), "int8", count)


def test_hallucinators_begin_near_the_identity_and_apart() -> None:
    memory = HaBa(HaBaLayout((3, 12, 12), "float32"), [0], 10)
    images = memory.decode()[0].view(2, 5, 3, 12, 12)
    bases = memory.bases.detach() + 0.5
    for j in range(5):
        correlation = torch.corrcoef(torch.stack([images[:, j].flatten(), bases.flatten()]))
        assert 0.5 < float(correlation[0, 1]) < 0.9999
    assert len(images[0].unique(dim=0)) == 5


def test_fitting_begins_with_a_real_image_for_each_basis() -> None:
    memory = HaBa(HaBaLayout((3, 8, 8), "float32", 3), [0, 1], [6, 1200])
    before = memory.bases.detach().clone()
    real = torch.rand(1206, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert not memory.fit(6, lambda positions: real[positions])
    torch.testing.assert_close(memory.bases[2:].detach(), real[6::3] - 0.5)
    assert same_bits(memory.bases[:2].detach(), before[:2])


@every_format
def test_gradients_reach_what_an_image_is_made_of_and_no_other(
    number_format: NumberFormat,
) -> None:
    memory = HaBa(HaBaLayout((3, 8, 8), number_format, 3), [0, 1], 3)
    image = memory(torch.tensor([4]))  # basis 1 through hallucinator 1
    torch.autograd.backward(image, torch.rand(image.shape, generator=torch.Generator()))
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad[1] != 0).float().mean()) > 0.9, name
        others = parameter.grad.clone()
        others[1] = 0
        assert not others.any(), name


def test_int8_clips_no_value() -> None:
    memory = trained(HaBa(HaBaLayout((3, 8, 8), "int8", 4), [0], 8), std=1)
    assert float(memory.bases.detach().abs().max()) == 0.5
    for name in WEIGHTS:
        scale: Any = memory.get_buffer(f"{name}_scale")
        for j in range(4):
            largest = float(memory.get_parameter(name)[j].detach().abs().max())
            assert largest / float(scale[j]) == pytest.approx(127, abs=1e-3)


def test_the_bound_of_sums_is_reached_and_not_passed() -> None:
    memory = HaBa(HaBaLayout((1, 8, 8), "float32", 2), [0], 4)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.fill_(-0.25)
        memory.decoder_weight[1] = -2.0
    # Nine taps of 0.25 * 0.25 and a bias, then 0.25 of that and 0.25, then nine times 2 and a bias.
    encoded = 9 * 0.25 * 0.25 + 0.25
    scaled = 0.25 * encoded + 0.25
    assert memory.largest_sum() == pytest.approx(9 * 2 * scaled + 0.25)
    with torch.no_grad():
        memory.decoder_weight.fill_(1e-3)
    assert memory.largest_sum() == pytest.approx(encoded)
    with torch.no_grad():
        memory.shift[1, 0, 2, 3] = -7.0
    assert memory.largest_sum() == pytest.approx(0.25 * encoded + 7)
    with torch.no_grad():
        memory.scale[0, 0, 0, 0] = float("nan")
    assert not memory.largest_sum() < float("inf")

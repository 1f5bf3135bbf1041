"""The hierarchical memory, against a decoder written out with loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hmn_replay import condense, load_dataset
from hmn_replay.errors import ConfigError
from hmn_replay.memory import NUMBER_FORMATS, HierarchicalMemory, HMNLayout
from tests.support import PLAIN_FORMATS, TINY, rounded_by_hand, same_bits, trained

MakeLayout = Callable[..., HMNLayout]

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", NUMBER_FORMATS)

CIFAR = HMNLayout((3, 32, 32), "int8", 8, 8, 4, 4, 6, (48, 32, 24))

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
    is_coded = layout.is_coded
    bias_format = "float32" if number_format == "float32" else "float16"
    # Of coded integers; 0 stands for the step that the largest value gives.
    own_step, shared_step = (1 / 4, 1 / 16) if is_coded else (0, 0)
    c = int(memory.class_index[index])
    dataset = rounded_by_hand(memory.dataset_memory, number_format, shared_step)
    extractor = rounded_by_hand(memory.extractor_weight[c], number_format, shared_step)
    bias = rounded_by_hand(memory.extractor_bias[c], bias_format)
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
    last = layout.num_doublings
    for number in range(last + 1):
        step = 0.35 * math.sqrt(2 / (9 * len(x))) if is_coded else 0
        weight = memory.get_parameter(f"decoder_weight_{number}")
        own_bias = rounded_by_hand(memory.get_parameter(f"decoder_bias_{number}"), bias_format)
        x = convolved(x, rounded_by_hand(weight, number_format, step), own_bias)
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
    make_layout: MakeLayout, number_format: str, fields: dict[str, Any]
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format, **fields), [7, -3], [2, 3]))
    images, labels = memory.decode()
    assert labels.tolist() == [7, 7, -3, -3, -3]
    expected = torch.stack([decoded_by_hand(memory, index) for index in range(5)])
    assert images.shape == expected.shape == (5, *memory.image_shape)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=3e-6)
    assert float((expected[0] - expected[4]).abs().max()) > 0.01


# Coded weights of few steps may be 0, and stop what flows through them.
@pytest.mark.parametrize("number_format", PLAIN_FORMATS)
@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_reach_every_value_behind_an_image_and_no_other(
    make_layout: MakeLayout, number_format: str, fields: dict[str, Any]
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


def test_instance_memories_have_a_scale_for_each_class_and_channel(make_layout: MakeLayout) -> None:
    memory = trained(HierarchicalMemory(make_layout("int8"), [0, 1, 2], [1, 4, 2]))
    scale = memory.get_buffer("instance_memory_scale")
    assert scale.shape == (3, 2, 1, 1)
    assert len(scale.unique()) == 6


@every_format
def test_the_latent_values_of_one_class_move_no_other(
    make_layout: MakeLayout, number_format: str
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


# Shapes.


def test_the_grid_covers_the_image(make_layout: MakeLayout) -> None:
    assert CIFAR.grid == (4, 4)
    assert make_layout(image_shape=(1, 28, 30), stride=8, decoder_channels=(2, 2, 2)).grid == (4, 4)
    assert make_layout(image_shape=(1, 9, 8), stride=2, decoder_channels=(2,)).grid == (5, 4)
    assert make_layout(image_shape=(1, 8, 33), stride=32, decoder_channels=(2,) * 5).grid == (1, 2)


def test_a_layout_of_lists_is_one_of_tuples() -> None:
    lists: dict[str, Any] = {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(CIFAR).items()
    }
    layout = HMNLayout(**lists)
    assert layout == CIFAR
    assert hash(layout) == hash(CIFAR)
    assert (layout.image_shape, layout.decoder_channels) == ((3, 32, 32), (48, 32, 24))


def test_integers_of_numpy_are_integers(make_layout: MakeLayout) -> None:
    four: Any = np.int64(4)
    channels: Any = np.array([5, 4]).tolist()
    layout = make_layout(stride=four, decoder_channels=channels)
    assert layout == make_layout()
    assert all(type(number) is int for number in (layout.stride, *layout.decoder_channels))


def test_the_decoder_goes_from_the_concatenated_tiers_to_2_x_2_pixels() -> None:
    assert CIFAR.num_doublings == 3
    assert CIFAR.convolutions == [(14, 48), (48, 32), (32, 24), (24, 12)]


def test_num_floats_is_the_papers_count_worked_out_by_hand() -> None:
    dataset, classes, instances = 8 * 16, 10 * 4 * 16, 100 * 6 * 16
    extractors = 10 * (8 * 4 + 4)
    decoder = sum(9 * i * o + o for i, o in ((14, 48), (48, 32), (32, 24), (24, 12)))
    expected = dataset + classes + instances + extractors + decoder
    assert HierarchicalMemory.num_floats_of(CIFAR, 10, 100) == expected
    memory = HierarchicalMemory(CIFAR, range(10), 10)
    assert memory.num_floats == sum(p.numel() for p in memory.parameters()) == expected


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stride", 1, "stride is 2, 4, 8, 16 or 32; got 1"),
        ("stride", 12, "stride is 2, 4, 8, 16 or 32; got 12"),
        ("dataset_channels", 0, "dataset_channels is 1 to 512; got 0"),
        ("feature_channels", 513, "feature_channels is 1 to 512; got 513"),
        ("class_channels", 1.0, "class_channels is an integer; got 1.0"),
        ("instance_channels", True, "instance_channels is an integer; got True"),
        ("decoder_channels", 5, "decoder_channels is a sequence of integers; got 5"),
        ("decoder_channels", (5, 0), r"decoder_channels\[1\] is 1 to 512; got 0"),
        ("decoder_channels", (5,), r"one entry a doubling, 2 for stride 4; got \(5,\)"),
        ("decoder_channels", (5, 5, 5), r"one entry a doubling, 2 for stride 4"),
        ("image_bytes", 5, "image_bytes is 1 or more where values are entropy-coded, and 0 oth"),
        ("number_format", "entropy", "image_bytes is 1 or more where values are entropy-coded"),
        ("number_format", "int4", "number format must be one of float32"),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(
    make_layout: MakeLayout, field: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(make_layout(), **{field: value})


def test_the_bound_of_sums_is_that_of_a_decoder_of_one_weight(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout("float32"), [0], 1)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.zero_()
        memory.instance_memory[0, 1, 0, 1] = -3.0
        memory.get_parameter("decoder_weight_0")[2, 5, 1, 1] = 0.5
        memory.get_parameter("decoder_bias_0")[2] = 1.0
        memory.get_parameter("decoder_weight_1")[3, 2, 1, 1] = -10.0
    assert memory.largest_sum() == pytest.approx(10 * (0.5 * 3 + 1))
    with torch.no_grad():
        memory.dataset_memory[0, 0, 0] = float("nan")
    assert not memory.largest_sum() < float("inf")


# choose_layout.


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_cifar_fits_at_the_papers_budgets(num_classes: int, number_format: str) -> None:
    for budget in ("60 KiB", "120 KiB", 1_228_800, 6_144_000):
        layout = HierarchicalMemory.choose_layout(budget, (3, 32, 32), num_classes, number_format)
        assert HierarchicalMemory.max_images(layout, budget, num_classes) >= 2 * num_classes


@pytest.mark.parametrize("number_format", ["int8", "entropy"])
def test_room_for_more_images_than_there_are_goes_to_better_ones(number_format: str) -> None:
    sizes = ("1 MiB", (3, 32, 32), 10, number_format)
    plain, few, many = (HierarchicalMemory.choose_layout(*sizes, n) for n in (None, 50, 10**6))
    assert plain == many
    field = "image_bytes" if number_format == "entropy" else "instance_channels"
    assert getattr(few, field) > getattr(plain, field)
    assert HierarchicalMemory.group_bytes(few) <= 4 * HierarchicalMemory.group_bytes(plain) + 64


def test_a_memory_of_the_largest_image_decodes() -> None:
    layout = HierarchicalMemory.choose_layout("1 MiB", (3, 224, 224), 1)
    images, _ = HierarchicalMemory(layout, [0], 1).decode()
    assert images.shape == (1, 3, 224, 224)
    assert bool(torch.isfinite(images).all())


# fit.


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_instance_memories_begin_with_the_principal_components(
    make_layout: MakeLayout, number_format: str
) -> None:
    """Their products are those of the images' cells on numpy's first right singular vectors."""
    layout = make_layout(number_format, (3, 9, 14))
    memory = HierarchicalMemory(layout, [0, 1], [30, 20])
    generator = torch.Generator().manual_seed(3)
    real = torch.rand(50, 3, 9, 14, generator=generator)
    assert not memory.fit(0, lambda positions: real[positions])
    padded = np.zeros((50, 3, 12, 16))
    padded[:, :, :9, :14] = real.double().numpy() - 0.5
    cells = padded.reshape(50, 3, 3, 4, 4, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    *_, components = np.linalg.svd(cells, full_matrices=False)
    wanted = cells @ components[:2].T
    found = memory.instance_memory.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, 2)
    for own, other in zip(found.T, wanted.T, strict=True):
        assert abs(np.corrcoef(own, other)[0, 1]) == pytest.approx(1, abs=1e-4)
    deviation = np.sqrt(np.square(found).mean(axis=0))
    assert deviation[0] == pytest.approx(2.0 if layout.is_coded else 1.0, rel=1e-3)
    if not layout.is_coded:
        assert deviation[1] == pytest.approx(1.0, rel=1e-3)


def windows(images: Tensor) -> np.ndarray[Any, Any]:
    """Gather what each cell of 4 x 4 pixels and its surroundings cover, grey beyond, and a one."""
    side, stride, around = (9, 14), 4, 4
    pixels = images.double().numpy() - 0.5
    rows = []
    for image in pixels:
        for top in range(-around, 12 - around, stride):
            for left in range(-around, 16 - around, stride):
                row = [1.0]
                for c, i, j in itertools.product(range(3), range(12), range(12)):
                    inside = 0 <= top + i < side[0] and 0 <= left + j < side[1]
                    row.append(image[c, top + i, left + j] if inside else 0.0)
                rows.append(row)
    return np.array(rows)


def ridge_encoder(memory: HierarchicalMemory, num_images: int, ridge: float) -> Any:
    """Return the ridge regression from windows to instance memories, ``(F + 1, C)``."""
    inputs = windows(memory.decode(torch.arange(num_images))[0])
    codes = memory.value("instance_memory", torch.arange(num_images)).detach()
    squares = inputs.T @ inputs
    squares += ridge * np.trace(squares) / len(squares) * np.eye(len(squares))
    rows = codes.permute(0, 2, 3, 1).reshape(-1, codes.shape[1]).double().numpy()
    return np.linalg.solve(squares, inputs.T @ rows)


@pytest.mark.parametrize("number_format", ["float32", "entropy"])
def test_images_added_to_others_are_encoded_by_what_undoes_the_decoder(
    make_layout: MakeLayout, number_format: str
) -> None:
    """The encoder is that of a ridge regression from windows to instance memories, cell by cell."""
    memory = HierarchicalMemory(make_layout(number_format, (3, 9, 14)), [0, 1], [30, 20])
    with torch.no_grad():
        memory.instance_memory.normal_(generator=torch.Generator().manual_seed(1))
    memory.update_scales()
    memory.add_classes([5], [4], seed=0)
    memory.update_scales(2)
    generator = torch.Generator().manual_seed(3)
    real = torch.rand(4, 3, 9, 14, generator=generator)
    before = memory.instance_memory.detach().clone()

    encoder = ridge_encoder(memory, 50, 0.01)
    wanted = (windows(real) @ encoder).reshape(4, 3, 4, -1).transpose(0, 3, 1, 2)
    assert not memory.fit(50, lambda positions: real[positions - 50])
    found = memory.instance_memory.detach()
    np.testing.assert_allclose(found[50:].numpy(), wanted, atol=1e-4)
    assert found[:50].equal(before[:50])
    for name in ("class_memory", "extractor_weight", "extractor_bias"):
        mean = memory.value(name, torch.tensor([0, 30])).mean(dim=0)
        torch.testing.assert_close(memory.get_parameter(name)[2], mean)


def test_an_encoded_image_is_near_before_any_step() -> None:
    """What a decoder learned of some classes serves the next: one step is nearly enough."""
    digits = load_dataset("digits", "train")
    first, second = (digits.take(digits.labels // 3 == part) for part in (0, 1))
    options = {**TINY, "outer_steps": 0, "over_budget": 0.0, "warm_start_batch": 64}
    memory = condense(first, 12_000, **{**options, "warm_start_steps": 150})
    few, many = (
        condense(second, 12_000, memory=memory, **{**options, "warm_start_steps": number})
        for number in (1, 150)
    )
    psnr = few.report["warm_start_psnr"]
    assert psnr > many.report["warm_start_psnr"] - 4
    # A mean image would be as far off as images differ.
    assert psnr > 1 - 10 * math.log10(float((second.images.float() / 255).var(dim=0).mean()))


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_the_codec_encodes_for_the_decoder_and_what_is_left_again(
    make_layout: MakeLayout, number_format: str
) -> None:
    memory = HierarchicalMemory(make_layout(number_format, (3, 9, 14)), [0, 1], [30, 20])
    with torch.no_grad():
        memory.instance_memory.normal_(generator=torch.Generator().manual_seed(1))
        memory.class_memory.normal_(generator=torch.Generator().manual_seed(2))
    memory.update_scales()
    before = memory.to_bytes()
    generator = torch.Generator().manual_seed(3)
    real = torch.randint(256, (6, 3, 9, 14), generator=generator).to(torch.uint8)
    codec = memory.codec()
    assert memory.has_codec and codec is not None
    found = codec(real)
    assert found.dtype == torch.uint8 and found.shape == real.shape

    shown = HierarchicalMemory(memory.layout, [0], 6)
    with torch.no_grad():
        for name, tensor in memory.tensors.items():
            if tensor.rows == "class":
                mean = memory.value(name, torch.tensor([0, 30])).mean(dim=0, keepdim=True)
                shown.get_parameter(name).copy_(mean)
            elif tensor.rows == "shared":
                shown.get_parameter(name).copy_(memory.value(name))
    encoder, wanted = ridge_encoder(memory, 50, 0.1), real.float() / 255
    codes = windows(wanted) @ encoder
    for _ in range(3):
        rows = torch.from_numpy(codes.reshape(6, 3, 4, -1).transpose(0, 3, 1, 2))
        with torch.no_grad():
            shown.instance_memory.copy_(rows)
        shown.update_scales()
        decoded = shown.decode()[0]
        codes = codes + windows(0.5 + (wanted - decoded) / 2)[:, 1:] @ encoder[1:]
    difference = (found.float() - decoded * 255).abs()
    # A value right between two integers may fall to either side.
    assert float(difference.median()) <= 0.51
    assert float(difference.max()) <= (2 if number_format in ("float32", "float16") else 20)
    assert memory.to_bytes() == before
    again = torch.cat([codec(real[:2]), codec(real[2:])])
    assert number_format == "int8" or (again.int() - found.int()).abs().max() <= 1


def test_the_codec_of_a_trained_memory_gives_images_that_are_near() -> None:
    digits = load_dataset("digits", "train")
    options = {**TINY, "outer_steps": 0, "over_budget": 0.0, "warm_start_batch": 64}
    memory = condense(digits, 12_000, **{**options, "warm_start_steps": 150})
    codec = memory.codec()
    assert codec is not None
    test = load_dataset("digits", "test").images
    wanted, shown = test.float() / 255, codec(test).float() / 255
    error = float((shown - wanted).square().mean())
    assert error < 0.6 * float(wanted.var(dim=0).mean())
    assert HierarchicalMemory(memory.layout, [0], 0).codec() is None

"""The hierarchical memory, against a decoder written out with loops."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.container_layout import MAX_CLASSES
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.layout import Layout
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.storage import serialise

MakeLayout = Callable[..., Layout]

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_format = pytest.mark.parametrize("number_format", NUMBER_FORMATS)

LAYOUTS: dict[str, dict[str, Any]] = {
    "square": {},
    "not divisible": {"image_shape": (1, 9, 14)},
    "stride 2": {"stride": 2, "decoder_channels": (3,)},
    "stride 8": {"stride": 8, "image_shape": (3, 12, 20), "decoder_channels": (4, 3, 2)},
}


def trained(memory: HierarchicalMemory, seed: int = 0) -> HierarchicalMemory:
    """Give every parameter a value of its own, biases too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    memory.update_scales()
    return memory


def by_hand(values: Tensor, number_format: NumberFormat) -> Tensor:
    """Return, as float64, what a tensor with one int8 scale is stored as."""
    values = values.detach()
    if number_format == "float32":
        return values.double()
    if number_format == "float16":
        return values.half().double()
    scale = max(float(values.abs().max()) / 127, 1e-8)
    scale = float(torch.tensor(scale, dtype=torch.float32))
    steps = [round(float(v / scale)) for v in values.flatten()]
    return torch.tensor(steps, dtype=torch.double).view_as(values) * scale


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
    c = int(memory.class_index[index])
    dataset = by_hand(memory.dataset_memory, number_format)
    extractor = by_hand(memory.extractor_weight[c], number_format)
    bias = by_hand(memory.extractor_bias[c], layout.bias_format)
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
        [by_hand(siblings[:, k], number_format)[place] for k in range(siblings.shape[1])]
    )
    x = torch.cat([silu(features), by_hand(memory.class_memory[c], number_format), instance])
    last = len(memory.decoder_weights) - 1
    for number in range(last + 1):
        weight = by_hand(memory.decoder_weights[number], number_format)
        x = convolved(x, weight, by_hand(memory.decoder_biases[number], layout.bias_format))
        if number < last:
            x = silu(x)
        if number < last - 1:
            x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    channels, height, width = layout.image_shape
    image = x.new_zeros(channels, height, width)
    for k, y, z in itertools.product(range(channels), range(height), range(width)):
        image[k, y, z] = x[4 * k + 2 * (y % 2) + z % 2, y // 2, z // 2]
    return 1 / (1 + torch.exp(-image))


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.numpy().tobytes() == two.numpy().tobytes()


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


@every_format
def test_images_are_float32_in_the_unit_interval(
    make_layout: MakeLayout, number_format: NumberFormat
) -> None:
    memory = HierarchicalMemory(make_layout(number_format), [0], 4)
    with torch.no_grad():
        memory.instance_memory.mul_(1000)
    memory.update_scales()
    images, labels = memory.decode()
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert not images.requires_grad
    assert images.is_contiguous()


def test_bytes_are_the_rounded_floats(make_layout: MakeLayout) -> None:
    memory = trained(HierarchicalMemory(make_layout(), [0, 1], 3))
    floats, _ = memory.decode()
    pixels, labels = memory.decode(dtype=torch.uint8)
    assert pixels.dtype == torch.uint8
    assert pixels.equal((floats * 255).round().to(torch.uint8))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_other_dtypes_are_refused(make_layout: MakeLayout) -> None:
    with pytest.raises(ConfigError, match=r"float32 or torch\.uint8; got torch\.float16"):
        HierarchicalMemory(make_layout(), [0], 1).decode(dtype=torch.float16)


@every_format
def test_the_bits_of_an_image_do_not_depend_on_its_company(
    make_layout: MakeLayout, number_format: NumberFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = make_layout(number_format, image_shape=(3, 12, 20))
    memory = trained(HierarchicalMemory(layout, [0, 1, 2], [5, 6, 7]))
    monkeypatch.setattr("hmn_replay.container._PIXELS_PER_CHUNK", 4 * 12 * 20)  # four at a time
    images, labels = memory.decode()
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 4, 5, 9, 18):
        chosen = torch.randperm(18, generator=generator)[:count]
        some, some_labels = memory.decode(chosen)
        assert same_bits(some, images[chosen])
        assert some_labels.equal(labels[chosen])
    twice, _ = memory.decode(torch.tensor([3, 3]))
    assert same_bits(twice, images[[3, 3]])


@pytest.mark.parametrize("num_threads", [1, 5])
def test_an_image_may_stand_anywhere(make_layout: MakeLayout, num_threads: int) -> None:
    """SIMD code leaves what does not fill a register to other code, threads where they part too."""
    layout = make_layout("float32", image_shape=(3, 12, 20), decoder_channels=(9, 7))
    memory = trained(HierarchicalMemory(layout, [0, 1, 2], [3, 1100, 20]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        images, _ = memory.decode()
        memory.keep(range(1, 1123))
        shifted, _ = memory.decode()
        memory.keep([1121])
        alone, _ = memory.decode()
    finally:
        torch.set_num_threads(before)
    assert same_bits(shifted, images[1:])
    assert same_bits(alone, images[-1:])


def test_no_image_at_all_is_fine(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [0, 1], 2)
    images, labels = memory.decode(torch.tensor([], dtype=torch.int64))
    assert images.shape == (0, 3, 8, 8)
    assert labels.shape == (0,)


@pytest.mark.parametrize(
    "indices", [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4], dtype=np.int32), range(4, -1, -2), []]
)
def test_images_may_be_named_by_any_sequence(make_layout: MakeLayout, indices: Any) -> None:
    memory = trained(HierarchicalMemory(make_layout(), [0, 1], [2, 3]))
    whole, labels = memory.decode()
    chosen = torch.tensor([int(index) for index in indices], dtype=torch.int64)
    images, own_labels = memory.decode(indices)
    assert same_bits(images, whole[chosen])
    assert own_labels.equal(labels[chosen])


def test_decoding_is_done_in_chunks_of_bounded_size(
    make_layout: MakeLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    conv2d = torch.nn.functional.conv2d

    def watched(x: Tensor, *args: Any, **options: Any) -> Tensor:
        sizes.append(len(x))
        return conv2d(x, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    monkeypatch.setattr("hmn_replay.container._PIXELS_PER_CHUNK", 200)
    HierarchicalMemory(make_layout(), [0], 10).decode()
    assert sizes == [3] * (4 * 3)  # 4 times 3 images, by 3 convolutions
    monkeypatch.setattr("hmn_replay.container._PIXELS_PER_CHUNK", 1)
    sizes.clear()
    HierarchicalMemory(make_layout(), [0], 2).decode()
    assert sizes == [1] * (2 * 3)


@every_format
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_keep_changes_no_image_by_one_bit(number_format: NumberFormat, data: st.DataObject) -> None:
    layout = Layout((3, 14, 18), number_format, 4, 3, 2, 2, 2, (5, 4))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    memory = trained(HierarchicalMemory(layout, range(len(counts)), counts))
    images, labels = memory.decode()
    indices = data.draw(st.permutations(range(len(images))))
    kept = indices[: data.draw(st.integers(0, len(indices)))]

    memory.keep(torch.tensor(kept, dtype=torch.int64) if data.draw(st.booleans()) else kept)

    stays = sorted(kept)
    assert memory.num_images == len(kept)
    assert memory.num_classes == len(counts)
    left, left_labels = memory.decode()
    assert same_bits(left, images[stays])
    assert left_labels.equal(labels[stays])
    assert memory.images_per_class == [
        sum(int(labels[i]) == c for i in stays) for c in range(len(counts))
    ]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], "positions from 0 to 5; got 0 to 6"),
        ([-1, 2], "positions from 0 to 5; got -1 to 2"),
        ([1, 3, 1], "each index may come once"),
        ([0.0, 1.5], "indices are integers; got torch.float32"),
        ([True, False], "indices are integers; got torch.bool: pass mask.nonzero"),
    ],
)
def test_keep_refuses_what_is_no_set_of_positions(
    make_layout: MakeLayout, indices: Any, message: str
) -> None:
    memory = HierarchicalMemory(make_layout(), [0, 1], 3)
    with pytest.raises(ConfigError, match=message):
        memory.keep(indices)
    assert memory.num_images == 6


@every_format
def test_extend_leaves_every_old_image_as_it_was(
    make_layout: MakeLayout, number_format: NumberFormat
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format), [4, -9], [3, 2]))
    images, _ = memory.decode()
    memory.extend([10**12, 0], [2, 4], seed=3)
    assert memory.classes.tolist() == [4, -9, 10**12, 0]
    assert memory.images_per_class == [3, 2, 2, 4]
    grown, labels = memory.decode()
    assert same_bits(grown[:5], images)
    assert labels.tolist() == [4] * 3 + [-9] * 2 + [10**12] * 2 + [0] * 4
    assert grown.unique(dim=0).shape[0] == 11
    memory.keep(range(2, 11))
    memory.extend(torch.tensor([77]), 1)
    assert same_bits(memory.decode()[0][:9], grown[2:])


def test_extend_depends_on_its_seed_and_not_on_how_often_it_is_called(
    make_layout: MakeLayout,
) -> None:
    memories = [HierarchicalMemory(make_layout(), [0], 2) for _ in range(3)]
    for memory, seed in zip(memories, (5, 5, 6), strict=True):
        memory.extend([1], 2, seed=seed)
    one, two, other = (memory.decode()[0] for memory in memories)
    assert same_bits(one, two)
    assert not one[2:].equal(other[2:])


def test_extend_that_fails_changes_nothing(make_layout: MakeLayout) -> None:
    layout = make_layout()
    memory = HierarchicalMemory(layout, [0, 1], 3, budget=layout.file_bytes(2, 7, 10_000))
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(BudgetError, match=r"8 images of 3 classes take [\d,]+ bytes, over the bud"):
        memory.extend([2], 2)
    with pytest.raises(ConfigError, match=r"classes \[1\] are in the memory already"):
        memory.extend([2, 1], 1)
    with pytest.raises(ConfigError, match="an integer of 0 or more, or 1 of them"):
        memory.extend([2], [1, 1])
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


def test_a_class_may_be_without_images(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [0, 1, 2], [1, 0, 2])
    assert memory.images_per_class == [1, 0, 2]
    assert memory.decode()[1].tolist() == [0, 2, 2]
    memory.update_scales()
    assert bool((memory.instance_scale > 0).all())


def test_a_memory_holds_a_thousand_classes_and_no_more(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), range(MAX_CLASSES), 1)
    assert memory.num_classes == MAX_CLASSES
    with pytest.raises(ConfigError, match=r"up to 1000 classes; got 1000 \+ 1"):
        memory.extend([-1], 1)
    with pytest.raises(ConfigError, match="1 to 1000 classes; got 1001"):
        HierarchicalMemory(make_layout(), range(MAX_CLASSES + 1), 1)


@pytest.mark.parametrize(
    ("classes", "counts", "message"),
    [
        ([], 1, "1 to 1000 classes; got 0"),
        ([1, 2, 1], 1, "classes come once each"),
        ([1.0, 2.0], 1, r"classes are integers of 64 bits; got \[1.0, 2.0\]"),
        (["cat"], 1, "classes are integers"),
        ([True, False], 1, "classes are integers"),
        (torch.tensor([0.5]), 1, "classes are integers"),
        ([0, 2**63], 1, r"integers of 64 bits; got \[0, 9223372036854775808\]"),
        ([-(2**63) - 1], 1, "integers of 64 bits"),
        (np.array([2**63], dtype=np.uint64), 1, "integers of 64 bits"),
        ([1, 2], 1.0, "integer of 0 or more, or 2 of them; got 1.0"),
        ([1, 2], True, "integer of 0 or more, or 2 of them; got True"),
        ([1, 2], None, "integer of 0 or more, or 2 of them; got None"),
        ([1, 2], -1, "integer of 0 or more, or 2 of them; got -1"),
        ([1, 2], [1], r"or 2 of them; got \[1\]"),
        ([1, 2], [1, -1], r"or 2 of them; got \[1, -1\]"),
        ([1, 2], [1, 1.5], r"or 2 of them; got \[1, 1.5\]"),
    ],
)
def test_classes_and_counts_that_cannot_be_are_refused(
    make_layout: MakeLayout, classes: Any, counts: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        HierarchicalMemory(make_layout(), classes, counts)


def test_labels_may_be_any_integers_of_64_bits(make_layout: MakeLayout) -> None:
    ends = [2**63 - 1, -(2**63)]
    memory = HierarchicalMemory(make_layout(), ends, 1)
    assert memory.classes.tolist() == ends
    with pytest.raises(ConfigError, match="integers of 64 bits"):
        memory.extend([2**63], 1)
    assert memory.decode()[1].tolist() == ends


def test_integers_of_numpy_are_integers(make_layout: MakeLayout) -> None:
    expected = HierarchicalMemory(make_layout(), [7, -3], 2)
    for classes, counts in (
        (np.array([7, -3]), np.int64(2)),
        ([np.int8(7), np.int64(-3)], np.array([2, 2])),
        (torch.tensor([7, -3]), [np.uint8(2), 2]),
    ):
        memory = HierarchicalMemory(make_layout(), classes, counts)  # type: ignore[arg-type]
        assert memory.classes.equal(expected.classes)
        assert memory.images_per_class == [2, 2]
        assert same_bits(memory.decode()[0], expected.decode()[0])


def test_a_memory_over_its_budget_is_refused(make_layout: MakeLayout) -> None:
    layout = make_layout()
    budget = layout.file_bytes(2, 6, 5000)
    assert HierarchicalMemory(layout, [0, 1], 3, budget=budget).file_bytes == budget
    with pytest.raises(BudgetError, match=f"over the budget of {budget - 1:,}; keep fewer"):
        HierarchicalMemory(layout, [0, 1], 3, budget=budget - 1)


def test_the_seed_gives_the_values(make_layout: MakeLayout) -> None:
    one, two, other = (HierarchicalMemory(make_layout(), [0, 1], 2, seed=s) for s in (1, 1, 2))
    assert same_bits(one.decode()[0], two.decode()[0])
    for name, value in one.named_parameters():
        if "bias" not in name:
            assert not value.equal(other.get_parameter(name))


@every_format
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


def test_gradients_are_those_of_the_images_decoded(make_layout: MakeLayout) -> None:
    """In float32, where rounding is no step, against finite differences."""
    memory = trained(HierarchicalMemory(make_layout("float32"), [0, 1], [2, 2])).double()
    indices = torch.tensor([3, 0, 3])
    weights = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    torch.autograd.backward(memory(indices), weights)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in memory.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator).double()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(float((memory(indices) * weights).sum()))
                parameter.sub_(direction, alpha=sign * 1e-6)
        assert parameter.grad is not None
        slope = (values[0] - values[1]) / 2e-6
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5), name


@every_format
def test_decoding_leaves_modes_flags_and_gradients(
    make_layout: MakeLayout, number_format: NumberFormat
) -> None:
    memory = HierarchicalMemory(make_layout(number_format), [0, 1], 2).eval()
    memory.dataset_memory.requires_grad_(False)
    memory.decode()
    assert not memory.training
    assert not memory.dataset_memory.requires_grad
    assert memory.class_memory.requires_grad
    assert all(parameter.grad is None for parameter in memory.parameters())


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


def test_counts_and_sizes_are_told(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [5, 3], [4, 1])
    assert (memory.num_classes, memory.num_images) == (2, 5)
    assert memory.image_shape == (3, 8, 8)
    assert memory.labels.tolist() == [5, 5, 5, 5, 3]
    assert memory.images_per_class == [4, 1]
    assert memory.num_floats == sum(parameter.numel() for parameter in memory.parameters())
    assert memory.file_bytes == memory.layout.file_bytes(2, 5, None)
    assert memory.budget_bytes is None
    assert HierarchicalMemory(make_layout(), [0], 1, budget="1 MiB").budget_bytes == 2**20


def test_a_copy_is_independent(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [0, 1], 3)
    images, _ = memory.decode()
    other = copy.deepcopy(memory)
    other.keep([0])
    other.extend([2], 1)
    assert same_bits(memory.decode()[0], images)


@pytest.mark.parametrize("indices", [[-1], [0, 99], [True, False], [0.5]])
def test_decode_refuses_what_is_no_position(make_layout: MakeLayout, indices: list[int]) -> None:
    memory = HierarchicalMemory(make_layout(), [3, 5], 2)
    with pytest.raises(ConfigError, match="indices are"):
        memory.decode(indices)


# remove


@pytest.mark.parametrize("number_format", NUMBER_FORMATS)
def test_removing_classes_changes_no_other_image(
    make_layout: Callable[..., Layout], number_format: NumberFormat
) -> None:
    memory = HierarchicalMemory(make_layout(number_format), [5, -2, 9, 7], [3, 2, 0, 4])
    before, labels = memory.decode()
    memory.remove([-2, 9])
    after, left = memory.decode()
    assert memory.classes.tolist() == [5, 7]
    assert memory.images_per_class == [3, 4]
    assert left.tolist() == [5] * 3 + [7] * 4
    assert after.equal(before[(labels == 5) | (labels == 7)])
    assert len(serialise(memory)) == memory.file_bytes


def test_what_cannot_be_removed_is_refused(make_layout: Callable[..., Layout]) -> None:
    memory = HierarchicalMemory(make_layout(), [5, 6], 1)
    for classes, message in (([7], "not in the memory"), ([5, 6], "1 class or more"), ([], "1 to")):
        with pytest.raises(ConfigError, match=message):
            memory.remove(classes)
    assert memory.classes.tolist() == [5, 6]


def test_scales_of_the_classes_before_stay(make_layout: Callable[..., Layout]) -> None:
    memory = HierarchicalMemory(make_layout("int8"), [0, 1, 2], 2)
    before = copy.deepcopy(dict(memory.named_buffers()))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(3)
    memory.update_scales(first_class=2)
    after = dict(memory.named_buffers())
    for name in ("dataset_scale", "decoder_scale"):
        assert after[name].equal(before[name])
    for name in ("class_scale", "extractor_scale", "instance_scale"):
        assert after[name][:2].equal(before[name][:2])
        torch.testing.assert_close(after[name][2:], 3 * before[name][2:])


def test_what_are_no_classes_or_positions_is_refused(make_layout: MakeLayout) -> None:
    for classes in (5, None, torch.tensor(5)):
        with pytest.raises(ConfigError, match="classes are a sequence of integers"):
            HierarchicalMemory(make_layout(), classes, 1)  # type: ignore[arg-type]
    assert HierarchicalMemory(make_layout(), [5, 6], torch.tensor(2)).num_images == 4  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="indices are integers; got None"):
        HierarchicalMemory(make_layout(), [5], 1).keep(None)  # type: ignore[arg-type]


@every_format
def test_decoding_does_not_depend_on_autocast(
    make_layout: MakeLayout, number_format: NumberFormat
) -> None:
    memory = trained(HierarchicalMemory(make_layout(number_format), [5, 3], 2))
    images, _ = memory.decode()
    with torch.autocast("cpu", torch.bfloat16):
        assert memory.decode()[0].equal(images)


def test_changes_of_shape_leave_the_flags(make_layout: MakeLayout) -> None:
    memory = HierarchicalMemory(make_layout(), [5, 3, 4], 2)
    frozen = {"class_memory", "instance_memory", "extractor_bias"}
    for name in frozen:
        memory.get_parameter(name).requires_grad_(False)
    memory.keep([0, 2, 4, 5])
    memory.extend([9], 1)
    memory.remove([5])
    assert {name for name, p in memory.named_parameters() if not p.requires_grad} == frozen


def test_values_do_not_depend_on_the_default_dtype(make_layout: MakeLayout) -> None:
    wanted = HierarchicalMemory(make_layout(), [5, 3], 2)
    torch.set_default_dtype(torch.float64)
    try:
        memory = HierarchicalMemory(make_layout(), [5, 3], 2)
        assert memory.decode()[0].equal(wanted.decode()[0])
        assert serialise(memory) == serialise(wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in memory.state_dict().items():
        assert value.dtype == wanted.state_dict()[name].dtype

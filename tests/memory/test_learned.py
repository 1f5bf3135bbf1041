"""What holds for every memory kind of learned images, whatever its table of stored tensors."""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn_replay.budget import Budget
from hmn_replay.errors import BudgetError, ConfigError, DataError, TrainingError
from hmn_replay.memory import (
    NUMBER_FORMATS,
    FrequencyLayout,
    HaBaLayout,
    HaBaMemory,
    HierarchicalMemory,
    HMNLayout,
    IDCLayout,
    LearnedMemory,
    LinBaLayout,
    LinBaMemory,
    MemoryLayout,
    PixelLayout,
    StoredTensor,
    loads,
)
from hmn_replay.memory.checks import MAX_CLASSES, check_num_classes
from tests.support import (
    LAYOUTS,
    LEARNED,
    LEARNED_FORMATS,
    PLAIN_FORMATS,
    learned_type,
    made,
    room_for,
    same_bits,
    trained,
    type_of,
)

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_kind = pytest.mark.parametrize("kind", LEARNED)
every_format = pytest.mark.parametrize(("kind", "number_format"), LEARNED_FORMATS)
every_plain_format = pytest.mark.parametrize(
    ("kind", "number_format"), list(itertools.product(LEARNED, PLAIN_FORMATS))
)
grouped = pytest.mark.parametrize(
    "kind", [kind for kind in LEARNED if LAYOUTS[kind]((3, 8, 8), "int8").group_size > 1]
)


def begun(
    kind: str, number_format: str = "int8", groups: Any = (2, 1), **options: Any
) -> LearnedMemory:
    """Return a memory as it is before training."""
    layout = LAYOUTS[kind]((3, 8, 8), number_format)
    counts = [layout.group_size * count for count in groups]
    return learned_type(kind)(layout, range(len(counts)), counts, **options)


def state_of(memory: LearnedMemory) -> dict[str, bytes]:
    state = memory.state_dict()
    return {name: value.numpy().tobytes() for name, value in state.items()}


# The table: what is declared is what there is.


@every_format
def test_parameters_and_scales_are_those_of_the_table(kind: str, number_format: str) -> None:
    memory = made(kind, number_format, groups=(2, 3))
    size = memory.layout.group_size
    table = type(memory).table(memory.layout)
    leading = {"shared": (), "class": (2,), "image": (5,)}
    shapes = {tensor.name: (*leading[tensor.rows], *tensor.shape) for tensor in table}
    assert {name: tuple(p.shape) for name, p in memory.named_parameters()} == shapes
    assert memory.num_floats == sum(map(math.prod, shapes.values()))
    assert memory.num_floats == type(memory).num_floats_of(memory.layout, 2, 5 * size)
    assert list(memory.bits()) == [tensor.name for tensor in table]
    scales = {name: tuple(b.shape) for name, b in memory.named_buffers() if "scale" in name}
    if number_format == "int8":
        wanted = {
            f"{t.name}_scale": t.scale_shape(2) for t in table if not t.is_bias and not t.scale
        }
        assert scales == wanted
    else:
        assert scales == {}


@every_format
def test_bits_are_those_of_the_number_format(kind: str, number_format: str) -> None:
    memory = made(kind, number_format)
    own = NUMBER_FORMATS[number_format]
    for tensor in type(memory).table(memory.layout):
        dtype = (own.of_biases if tensor.is_bias else own).dtype
        plain = 8.0 * memory.get_parameter(tensor.name).numel() * dtype.itemsize
        found = memory.bits()[tensor.name]
        assert found == plain if tensor.is_bias or not own.is_coded else 0 < found < plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "two words"}, "the name of a stored tensor is an identifier; got 'two words'"),
        ({"rows": "images"}, "rows are 'shared', 'class' or 'image'; got 'images'"),
    ],
)
def test_a_row_of_the_table_that_cannot_be_is_refused(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StoredTensor(**{"name": "values", "rows": "image", "shape": (3,), **fields})


@every_kind
def test_parameters_that_learn_are_grouped_by_their_rate(kind: str) -> None:
    memory = made(kind)
    rates = {tensor.name: tensor.rate for tensor in type(memory).table(memory.layout)}
    frozen = next(iter(rates))
    memory.get_parameter(frozen).requires_grad_(False)
    groups = memory.parameter_groups()
    factors = [group["factor"] for group in groups]
    assert factors == sorted(set(factors))
    found = {id(p): group["factor"] for group in groups for p in group["params"]}
    assert found == {
        id(memory.get_parameter(name)): rate for name, rate in rates.items() if name != frozen
    }


@every_kind
def test_what_classes_share_can_be_frozen(kind: str) -> None:
    memory = made(kind)
    memory.freeze_shared()
    learned = {name for name, p in memory.named_parameters() if p.requires_grad}
    table = type(memory).table(memory.layout)
    assert learned == {tensor.name for tensor in table if tensor.rows != "shared"}
    assert learned


@every_kind
def test_the_rows_of_an_image_are_those_that_its_gradient_reaches(kind: str) -> None:
    memory = trained(begun(kind, "float32", (2, 0, 3)), std=0.05)
    size = memory.layout.group_size
    indices = torch.tensor([4 * size, size, 4 * size])
    torch.autograd.backward(memory(indices), torch.rand(3, 3, 8, 8, generator=torch.Generator()))
    rows = dict((id(p), own) for p, own in memory.rows_of(indices))
    for tensor in type(memory).table(memory.layout):
        parameter = memory.get_parameter(tensor.name)
        assert parameter.grad is not None
        own = rows.pop(id(parameter))
        if tensor.rows == "shared":
            assert own is None
        else:
            reached = parameter.grad.flatten(1).any(dim=1).nonzero().flatten()
            assert own is not None
            assert own.tolist() == reached.tolist()
            assert own.tolist() == ([0, 2] if tensor.rows == "class" else [1, 4])
    assert not rows


# Decoding.


@every_format
def test_values_far_out_still_decode_to_the_unit_interval(kind: str, number_format: str) -> None:
    memory = made(kind, number_format)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(1000)
    memory.update_scales()
    images, _ = memory.decode()
    assert 0 <= float(images.min()) < float(images.max()) <= 1


@every_format
def test_what_is_decoded_is_what_training_sees(kind: str, number_format: str) -> None:
    memory = made(kind, number_format, image_shape=(1, 9, 14))
    seen = memory(torch.arange(memory.num_images)).detach()
    torch.testing.assert_close(memory.decode()[0], seen, rtol=0, atol=2e-6)


@every_format
def test_images_are_the_same_in_chunks_of_another_size(kind: str, number_format: str) -> None:
    """Of 120 x 180, twelve are decoded at once."""
    memory = made(kind, number_format, (1, 120, 180), groups=(9, 8))
    assert memory.chunk_size == 12
    images, labels = memory.decode()
    generator = torch.Generator().manual_seed(0)
    for count in (1, 11, 12, 13, 17):
        chosen = torch.randperm(memory.num_images, generator=generator)[:count]
        some, some_labels = memory.decode(chosen)
        assert same_bits(some, images[chosen])
        assert some_labels.equal(labels[chosen])


@pytest.mark.parametrize(("side", "size"), [(8, 256), (32, 256), (64, 64), (224, 5)])
def test_few_large_images_are_decoded_at_once(side: int, size: int) -> None:
    assert made("pixels", image_shape=(1, side, side), groups=(1, 1)).chunk_size == size


@every_kind
@pytest.mark.parametrize("num_threads", [1, 5])
def test_an_image_may_stand_anywhere(kind: str, num_threads: int) -> None:
    """SIMD code leaves what does not fill a register to other code, threads where they part too."""
    memory = made(kind, "float32", (3, 12, 21), classes=(0, 1, 2), groups=(3, 290, 20))
    size = memory.layout.group_size
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        images, _ = memory.decode()
        memory.keep(range(size, memory.num_images))
        shifted, _ = memory.decode()
        memory.keep(range(memory.num_images - size, memory.num_images))
        alone, _ = memory.decode()
    finally:
        torch.set_num_threads(before)
    assert same_bits(shifted, images[size:])
    assert same_bits(alone, images[-size:])


@every_format
def test_decoding_leaves_autocast_modes_flags_and_gradients(kind: str, number_format: str) -> None:
    memory = made(kind, number_format).eval()
    frozen = next(iter(memory.parameters())).requires_grad_(False)
    images, _ = memory.decode()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(memory.decode()[0], images)
    assert not memory.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in memory.parameters() if p is not frozen)
    assert all(parameter.grad is None for parameter in memory.parameters())


# Gradients.


# Coded weights of few steps may be 0, and stop what flows through them.
@every_plain_format
def test_gradients_reach_every_value(kind: str, number_format: str) -> None:
    memory = trained(begun(kind, number_format), std=0.05)
    images = memory(torch.arange(memory.num_images))
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(images, weights)
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # All but what decodes to pixels beyond black and white.
        assert float((parameter.grad != 0).float().mean()) > 0.9, name


@every_kind
def test_gradients_are_those_of_the_images_decoded(kind: str) -> None:
    """In float32, where rounding is no step, against finite differences."""
    memory = begun(kind, "float32").double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(0.4)  # no pixel near black or white, where it has no derivative
    indices = torch.tensor([memory.num_images - 1, 0, memory.num_images - 1])
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
        wanted = float((parameter.grad * direction).sum())
        assert slope == pytest.approx(wanted, rel=1e-5, abs=1e-7), name


@every_plain_format
def test_a_step_asks_its_device_for_nothing(kind: str, number_format: str) -> None:
    """Tensors of the meta device have no values: who asks for one, or mixes devices, fails."""
    memory = made(kind, number_format).to("meta")
    images = memory(torch.tensor([0, 3], device="meta"))
    assert images.shape == (2, 3, 8, 8)
    torch.autograd.backward(images.sum())
    for first_class in (0, 1):
        memory.update_scales(first_class)
    assert all(tensor.is_meta for tensor in memory.state_dict().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_format
def test_a_memory_on_a_gpu_is_the_same(kind: str, number_format: str) -> None:
    memory = made(kind, number_format)
    images, labels = memory.decode()
    moved = copy.deepcopy(memory).to("cuda")
    own_images, own_labels = moved.decode()
    torch.testing.assert_close(own_images.cpu(), images, rtol=0, atol=1e-5)
    assert own_labels.cpu().equal(labels)
    size = memory.layout.group_size
    for one in (memory, moved):
        one.add_classes([1], 2 * size)
        one.keep(range(size, one.num_images))
        one.remove([7])
    assert moved.to_bytes() == memory.to_bytes()
    for one in (memory, moved):  # by least squares, which another device rounds otherwise
        one.fit(size, lambda positions: torch.full((len(positions), 3, 8, 8), 0.3))
        one.update_scales(first_class=1)
    torch.testing.assert_close(moved.decode()[0].cpu(), memory.decode()[0], rtol=0, atol=0.02)


# Scales.


@every_kind
def test_scales_of_the_classes_before_stay(kind: str) -> None:
    memory = made(kind, classes=(0, 1, 2), groups=(2, 2, 2))
    before = copy.deepcopy(dict(memory.named_buffers()))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(3)
    memory.update_scales(first_class=2)
    for tensor in type(memory).table(memory.layout):
        old = before.get(f"{tensor.name}_scale")
        if old is None:
            continue
        after = memory.get_buffer(f"{tensor.name}_scale")
        if tensor.rows == "shared":
            assert after.equal(old), tensor.name
        else:
            assert after[:2].equal(old[:2]), tensor.name
            torch.testing.assert_close(after[2:], 3 * old[2:])


@every_kind
def test_no_value_is_clipped_once_the_scales_are_up_to_date(kind: str) -> None:
    """The largest value of each scale's own is 127 steps, by a loop over all of them."""
    memory = made(kind, "int8", classes=(0, 1, 2), groups=(1, 4, 2))
    owners = memory.class_index[:: memory.layout.group_size]
    for tensor in type(memory).table(memory.layout):
        if tensor.is_bias or tensor.scale is not None:
            continue
        latent = memory.get_parameter(tensor.name).detach()
        scale = memory.get_buffer(f"{tensor.name}_scale")
        rows = [latent[None]] if tensor.rows == "shared" else list(latent.split(1))
        if tensor.rows == "image":
            rows = [latent[owners == k] for k in range(3)]
        scales = scale[None] if tensor.rows == "shared" else scale
        assert len(rows) == len(scales)
        for own, of_class in zip(rows, scales, strict=True):
            for place in itertools.product(*map(range, of_class.shape)):
                window = tuple(
                    slice(None) if size == 1 else slice(at, at + 1)
                    for at, size in zip(place, of_class.shape, strict=True)
                )
                largest = float(own[(slice(None), *window)].abs().max())
                assert largest / float(of_class[place]) == pytest.approx(127, abs=1e-3)


# keep, extend, remove


@every_format
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_dropping_images_changes_no_other_by_one_bit(
    kind: str, number_format: str, data: st.DataObject
) -> None:
    groups = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(sum))
    memory = made(kind, number_format, (3, 10, 14), range(len(groups)), groups)
    images, labels = memory.decode()
    size = memory.layout.group_size
    chosen = data.draw(st.sets(st.integers(0, sum(groups) - 1)))
    stays = [size * group + j for group in sorted(chosen) for j in range(size)]
    memory.keep(stays)
    loaded = loads(memory.to_bytes())
    for one in (memory, loaded):
        left, left_labels = one.decode()
        assert same_bits(left, images[stays])
        assert left_labels.equal(labels[stays])
    if len(groups) > 1:
        memory.remove([1])
        rest = left_labels != 1
        assert same_bits(memory.decode()[0], images[stays][rest])


@grouped
def test_images_that_share_values_stay_or_go_together(kind: str) -> None:
    memory = made(kind)
    size = memory.layout.group_size
    images, _ = memory.decode()
    whole = list(range(size, 2 * size))
    for part in (whole[:-1], whole[1:], [*whole, 0], [i - 1 for i in whole]):
        with pytest.raises(ConfigError, match=f"{size} images share stored values, and are kept"):
            memory.keep(part)
    assert same_bits(memory.decode()[0], images)
    memory.keep(whole[::-1])
    assert same_bits(memory.decode()[0], images[whole])


@grouped
def test_images_that_share_values_are_added_together(kind: str) -> None:
    memory = made(kind)
    size = memory.layout.group_size
    for counts in (size + 1, [size, 1], 1):
        with pytest.raises(ConfigError, match=f"{size} images share stored values"):
            memory.add_classes([1, 2], counts)
        with pytest.raises(ConfigError, match=f"{size} images share stored values"):
            type(memory)(memory.layout, [1, 2], counts)


@every_format
def test_extend_leaves_every_old_image_as_it_was(kind: str, number_format: str) -> None:
    memory = made(kind, number_format, classes=(4, -9), groups=(3, 2))
    size, num_old = memory.layout.group_size, memory.num_images
    images, _ = memory.decode()
    memory.add_classes([10**12, 0], [2 * size, 4 * size], seed=3)
    assert memory.classes.tolist() == [4, -9, 10**12, 0]
    assert memory.images_per_class == [3 * size, 2 * size, 2 * size, 4 * size]
    grown, labels = memory.decode()
    assert same_bits(grown[:num_old], images)
    assert labels[num_old:].tolist() == [10**12] * (2 * size) + [0] * (4 * size)
    assert memory.file_bytes == len(memory.to_bytes())
    memory.keep(range(2 * size, memory.num_images))
    memory.add_classes(torch.tensor([77]), size)
    assert same_bits(memory.decode()[0][:-size], grown[2 * size :])


@every_kind
def test_new_classes_that_learn_leave_old_images_as_they_were(kind: str) -> None:
    """As a condensation does it: shared values frozen, scales of old classes left alone."""
    memory = made(kind)
    images, _ = memory.decode()
    memory.add_classes([1, 2], memory.layout.group_size)
    memory.freeze_shared()
    learned = [p for p in memory.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.5)
    new = torch.arange(len(images), memory.num_images)
    before = memory(new).detach()
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(memory(new).square().mean())
        optimizer.step()
        memory.update_scales(first_class=2)
    assert same_bits(memory.decode()[0][: len(images)], images)
    assert not memory.decode(new)[0].equal(before)


@every_kind
def test_extend_depends_on_its_seed_and_not_on_how_often_it_is_called(kind: str) -> None:
    memories = [made(kind) for _ in range(3)]
    for memory, seed in zip(memories, (5, 5, 6), strict=True):
        memory.add_classes([1], memory.layout.group_size, seed=seed)
    one, two, other = map(state_of, memories)
    assert one == two
    assert one != other


@every_format
def test_extend_that_fails_changes_nothing(kind: str, number_format: str) -> None:
    memory = made(kind, number_format)
    size, before = memory.layout.group_size, state_of(memory)
    images, _ = memory.decode()
    grown = copy.deepcopy(memory)
    grown.add_classes([2], 3 * size)
    memory.budget_bytes = memory.file_bytes + 1
    with pytest.raises(BudgetError) as error:
        memory.add_classes([2], 3 * size)
    # What is named is the real size of the file, the code among it.
    grown.budget_bytes = memory.budget_bytes
    wanted = f"{len(grown)} images of 3 classes take {len(grown.to_bytes()):,} bytes, over the bud"
    assert wanted in str(error.value)
    with pytest.raises(ConfigError, match=r"classes \[7\] are in the memory already"):
        memory.add_classes([2, 7], size)
    with pytest.raises(ConfigError, match="an integer of 0 or more, or 1 of them"):
        memory.add_classes([2], [size, size])
    assert state_of(memory) == before
    assert memory.images_per_class == [2 * size, 3 * size]
    assert same_bits(memory.decode()[0], images)


@every_kind
def test_changes_of_shape_leave_what_is_frozen(kind: str) -> None:
    memory = made(kind, classes=(5, 3, 4), groups=(2, 2, 2))
    size = memory.layout.group_size
    frozen = {t.name for t in type(memory).table(memory.layout) if t.rows == "image"}
    for name in frozen:
        memory.get_parameter(name).requires_grad_(False)
    memory.keep(range(2 * size, 6 * size))
    memory.add_classes([9], size)
    memory.remove([5])
    assert {name for name, p in memory.named_parameters() if not p.requires_grad} == frozen


@every_kind
def test_the_state_of_a_pruned_twin_brings_its_counts(kind: str) -> None:
    memory, twin = made(kind, groups=(4, 2)), made(kind, groups=(4, 2), seed=1)
    size = memory.layout.group_size
    memory.keep(range(3 * size))
    twin.keep(range(3 * size, 6 * size))
    assert (memory.images_per_class, twin.images_per_class) == ([3 * size, 0], [size, 2 * size])
    memory.load_state_dict(twin.state_dict())
    assert memory.images_per_class == [size, 2 * size]
    assert memory.to_bytes() == twin.to_bytes()
    assert same_bits(memory.decode()[0], twin.decode()[0])


# Classes, counts, seeds.


@every_kind
def test_a_class_may_be_without_images(kind: str) -> None:
    memory = made(kind, classes=(0, 1, 2), groups=(1, 0, 2))
    size = memory.layout.group_size
    assert memory.images_per_class == [size, 0, 2 * size]
    assert memory.decode()[1].tolist() == [0] * size + [2] * (2 * size)
    assert all(bool((b > 0).all()) for name, b in memory.named_buffers() if "scale" in name)
    assert loads(memory.to_bytes()).images_per_class == memory.images_per_class


def test_a_memory_holds_a_thousand_classes_and_no_more() -> None:
    memory = made("linba", classes=range(MAX_CLASSES), groups=[1] * MAX_CLASSES)
    assert memory.num_classes == MAX_CLASSES
    with pytest.raises(ConfigError, match=r"up to 1000 classes; got 1000 \+ 1"):
        memory.add_classes([-1], 1)
    with pytest.raises(ConfigError, match="1 to 1000 classes; got 1001"):
        type(memory)(memory.layout, range(MAX_CLASSES + 1), 1)


def test_labels_may_be_any_integers_of_64_bits() -> None:
    ends = [2**63 - 1, -(2**63)]
    memory = made("hmn", classes=ends, groups=(1, 1))
    assert memory.classes.tolist() == ends
    with pytest.raises(ConfigError, match="integers of 64 bits"):
        memory.add_classes([2**63], 1)
    assert loads(memory.to_bytes()).decode()[1].tolist() == ends


def test_integers_of_numpy_and_torch_are_integers() -> None:
    memory_type, layout = learned_type("hmn"), LAYOUTS["hmn"]((3, 8, 8), "int8")
    expected = memory_type(layout, [7, -3], 2)
    given_ones: list[tuple[Any, Any]] = [
        (np.array([7, -3]), np.int64(2)),
        ([np.int8(7), np.int64(-3)], np.array([2, 2])),
        (torch.tensor([7, -3]), [np.uint8(2), 2]),
        ([7, -3], torch.tensor(2)),
    ]
    for classes, counts in given_ones:
        assert memory_type(layout, classes, counts).to_bytes() == expected.to_bytes()


@every_format
def test_a_memory_over_its_budget_is_refused(kind: str, number_format: str) -> None:
    memory = begun(kind, number_format, budget=9999)
    budget = memory.file_bytes
    assert begun(kind, number_format, budget=9000).file_bytes == budget
    tight = begun(kind, number_format, budget=budget)
    assert (tight.file_bytes <= budget, tight.budget_bytes) == (True, budget)
    with pytest.raises(BudgetError, match="over the budget of 300; keep fewer"):
        begun(kind, number_format, budget=300)


@every_kind
def test_the_seed_gives_the_values(kind: str) -> None:
    one, two, other = (begun(kind, "float32", seed=seed) for seed in (1, 1, 2))
    assert one.to_bytes() == two.to_bytes()
    for tensor in type(one).table(one.layout):
        first, second = one.get_parameter(tensor.name), other.get_parameter(tensor.name)
        is_fixed = bool((first == first.flatten()[0]).all())  # zeros or ones
        assert first.equal(second) == is_fixed


@every_kind
def test_values_do_not_depend_on_the_default_dtype(kind: str) -> None:
    wanted = begun(kind)
    torch.set_default_dtype(torch.float64)
    try:
        memory = begun(kind)
        assert same_bits(memory.decode()[0], wanted.decode()[0])
        assert memory.to_bytes() == wanted.to_bytes()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in memory.state_dict().items():
        assert value.dtype == wanted.state_dict()[name].dtype


# Layouts: what is frozen, and the words of the file.

image_shapes = st.tuples(st.sampled_from([1, 3]), st.integers(8, 224), st.integers(8, 224))
few = st.integers(1, 6)


@st.composite
def layouts(draw: st.DrawFn, kind: str) -> MemoryLayout:
    """Draw a layout whose images take few bytes."""
    own = [name for learned, name in LEARNED_FORMATS if learned == kind]
    number_format = draw(st.sampled_from(own))
    channels, *sides = draw(image_shapes)
    if kind == "hmn":
        stride = draw(st.sampled_from([2, 4, 8, 16, 32]))
        # A grid of thousands of cells would make files of megabytes.
        height, width = (min(side, 12 * stride) for side in sides)
        return HMNLayout(
            (channels, height, width),
            number_format,
            stride,
            dataset_channels=draw(few),
            feature_channels=draw(few),
            class_channels=draw(few),
            instance_channels=draw(few),
            decoder_channels=tuple(draw(few) for _ in range(stride.bit_length() - 1)),
            image_bytes=draw(few) if NUMBER_FORMATS[number_format].is_coded else 0,
        )
    height, width = (min(side, 24) for side in sides)
    shape = (channels, height, width)
    if kind == "idc":
        return IDCLayout(
            shape, number_format, draw(st.integers(2, min(8, height // 2, width // 2)))
        )
    if kind == "haba":
        return HaBaLayout(shape, number_format, draw(few))
    if kind == "linba":
        return LinBaLayout(shape, number_format, draw(st.integers(1, 40)), draw(st.integers(1, 8)))
    if kind == "fred":
        most = channels * height * width // 8
        count = 8 * draw(st.integers(1, most))
        is_coded = NUMBER_FORMATS[number_format].is_coded
        return FrequencyLayout(shape, number_format, count, draw(few) if is_coded else 0)
    assert kind == "pixels"
    return PixelLayout(shape, number_format)


@every_kind
@given(data=st.data())
def test_a_layout_is_read_back_from_its_words(kind: str, data: st.DataObject) -> None:
    layout = data.draw(layouts(kind))
    words = layout.words()
    assert all(word and " " not in word for word in words)
    assert type(layout).from_words(words) == layout


@every_format
def test_words_that_no_layout_writes_are_refused(kind: str, number_format: str) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), number_format)
    words = list(layout.words())
    others: list[list[str]] = [[], words[:-1], [*words, "2"], ["int4", *words[1:]]]
    for position in range(1, len(words)):
        for text in (
            "",
            "x",
            "-1",
            f"+{words[position]}",
            f"0{words[position]}",
            "1,,2",
            "1.0",
            f"{words[position]},",
            "9" * 5000,
            "\uff15",
        ):
            others.append([*words[:position], text, *words[position + 1 :]])
    for other in others:
        with pytest.raises(ValueError, match=r"."):
            type(layout).from_words(other)


@every_kind
def test_fields_of_a_layout_are_brought_to_their_types(kind: str) -> None:
    layout = LAYOUTS[kind]((3, 8, 8), "int8")
    shape: Any = np.array([3, 8, 8])
    same = LAYOUTS[kind](image_shape=shape.tolist(), number_format="int8")
    assert same == layout
    assert hash(same) == hash(layout)
    assert all(type(side) is int for side in same.image_shape)


@every_kind
def test_what_is_no_image_shape_or_number_format_is_refused(kind: str) -> None:
    choose = learned_type(kind).choose_layout
    message = r"\(C, H, W\) with C 1 or 3 and H, W from 8"
    shapes: list[Any] = [(2, 8, 8), (3, 0, 8), (3, 8), None]
    for shape in shapes:
        with pytest.raises(ConfigError, match=message):
            LAYOUTS[kind](shape, "int8")
        with pytest.raises(ConfigError, match=message):
            choose("1 MiB", shape, 2)
    for shape in [(3, 7, 8), (3, 8, 225)]:
        with pytest.raises(DataError, match="sides of 8 to 224 pixels"):
            LAYOUTS[kind](shape, "int8")
        with pytest.raises(DataError, match="sides of 8 to 224 pixels"):
            choose("1 MiB", shape, 2)
    message = rf"number format must be one of {', '.join(NUMBER_FORMATS)}; got 'int4'; did you mea"
    with pytest.raises(ConfigError, match=message):
        LAYOUTS[kind]((3, 8, 8), "int4")
    with pytest.raises(ConfigError, match=message):
        choose("1 MiB", (3, 8, 8), 2, "int4")


@every_kind
def test_a_layout_of_another_kind_is_refused(kind: str) -> None:
    own = learned_type(kind)
    for other in LEARNED:
        layout = LAYOUTS[other]((3, 8, 8), "int8")
        if not isinstance(layout, own.Layout):
            message = f"the layout of memory kind '{kind}' is a {own.Layout.__name__}; got"
            with pytest.raises(ConfigError, match=message):
                own(layout, [0], layout.group_size)


@every_kind
def test_a_kind_that_is_not_coded_says_which_formats_it_has(kind: str) -> None:
    own = learned_type(kind)
    assert (kind, own.default_number_format) in LEARNED_FORMATS
    if own.codes_entropy:
        return
    message = f"memory kind '{kind}' has one of the number formats {', '.join(PLAIN_FORMATS)}; got"
    with pytest.raises(ConfigError, match=message):
        own.choose_layout("1 MiB", (3, 8, 8), 2, "entropy")


# Sizes: what a memory of a layout would take.


@st.composite
def fitted(draw: st.DrawFn, kind: str) -> tuple[MemoryLayout, int, int]:
    """Draw a layout, a number of classes and a budget that holds a group a class, and not much."""
    layout = draw(layouts(kind).filter(lambda layout: not layout.is_coded))
    num_classes = draw(st.one_of(st.integers(1, 12), st.integers(1, MAX_CLASSES)))

    def needed(num_classes: int) -> int:
        return room_for(layout, num_classes, num_classes * layout.group_size)

    num_classes = min(num_classes, max(1, 100_000 * num_classes // needed(num_classes)))
    extra_bytes = draw(st.one_of(st.integers(0, 300), st.integers(0, 60_000)))
    return layout, num_classes, needed(num_classes) + 8 + extra_bytes


def smallest_named(error: pytest.ExceptionInfo[BudgetError]) -> int:
    """Return the last number of bytes in the message: the smallest budget that would do."""
    return int(re.findall(r"([\d,]+) bytes", str(error.value))[-1].replace(",", ""))


@every_kind
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_real_file_never_exceeds_its_budget_and_no_further_image_fits(
    kind: str, data: st.DataObject
) -> None:
    layout, num_classes, budget = data.draw(fitted(kind))
    own, size = learned_type(kind), layout.group_size
    num_images = own.max_images(layout, budget, num_classes)
    assert num_images % size == 0
    fair, extra = divmod(num_images // size, num_classes)
    counts = [size * (fair + (index < extra)) for index in range(num_classes)]
    assert counts[-1] > 0
    memory = own(layout, range(num_classes), counts)
    memory.budget_bytes = budget

    num_bytes = len(memory.to_bytes())

    assert num_bytes <= budget
    assert (
        num_bytes == memory.file_bytes == own.file_bytes_of(layout, num_classes, num_images, budget)
    )
    assert own.file_bytes_of(layout, num_classes, num_images + size, budget) > budget

    groups = data.draw(st.sets(st.integers(0, num_images // size - 1), max_size=20))
    memory.keep([size * group + j for group in sorted(groups) for j in range(size)])
    assert len(memory.to_bytes()) == memory.file_bytes <= budget


@every_format
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_the_size_of_the_file_is_known_to_the_byte(
    kind: str, number_format: str, data: st.DataObject
) -> None:
    labels = data.draw(
        st.sets(st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300), min_size=1, max_size=6)
    )
    groups = [data.draw(st.integers(0, 4)) for _ in labels]
    shape = data.draw(st.sampled_from([(1, 8, 8), (3, 9, 13)]))
    memory = made(kind, number_format, shape, sorted(labels), groups)
    memory.budget_bytes = data.draw(st.none() | st.integers(1, 10**15))
    names = data.draw(st.dictionaries(st.sampled_from(sorted(labels)), st.text(max_size=9)))
    memory.class_names = names
    size = memory.file_bytes
    assert size == len(memory.to_bytes())
    assert size == type(memory).file_bytes_of(
        memory.layout,
        sorted(labels),
        memory.num_images,
        memory.budget_bytes,
        memory.code_bytes,
        memory.names_bytes,
    )


@every_kind
@settings(deadline=None, max_examples=50)
@given(data=st.data(), num_classes=st.integers(1, MAX_CLASSES), budget=st.integers(1, 10**9))
def test_the_budget_named_as_the_smallest_does_and_a_byte_less_does_not(
    kind: str, data: st.DataObject, num_classes: int, budget: int
) -> None:
    layout, own = data.draw(layouts(kind)), learned_type(kind)
    try:
        num_images = own.max_images(layout, budget, num_classes)
    except BudgetError:
        pass
    else:
        assert num_images >= num_classes * layout.group_size
        return
    group = "one image" if layout.group_size == 1 else rf"{layout.group_size} images, which .*,"
    with pytest.raises(BudgetError, match=f"{budget:,} bytes does not hold {group} of") as error:
        own.max_images(layout, budget, num_classes)
    smallest = smallest_named(error)
    assert smallest > budget
    assert own.max_images(layout, smallest, num_classes) >= num_classes
    with pytest.raises(BudgetError):
        own.max_images(layout, smallest - 1, num_classes)


@every_kind
def test_every_budget_of_few_bytes_names_one_that_does(kind: str) -> None:
    """The digits of the budget are in the header, so the answer may move as it is named."""
    layout, own = LAYOUTS[kind]((1, 8, 8), "int8"), learned_type(kind)
    for num_classes in range(1, 40):
        with pytest.raises(BudgetError) as error:
            own.max_images(layout, 1, num_classes)
        smallest = smallest_named(error)
        assert own.max_images(layout, smallest, num_classes) >= num_classes
        with pytest.raises(BudgetError):
            own.max_images(layout, smallest - 1, num_classes)


@every_kind
def test_a_budget_may_be_a_text(kind: str) -> None:
    layout, own = LAYOUTS[kind]((3, 8, 8), "int8"), learned_type(kind)
    assert own.max_images(layout, "120 KiB", 10) == own.max_images(layout, 122_880, 10)


@every_kind
@pytest.mark.parametrize("num_classes", [4.0, True, 0, -1, 1001])
def test_a_number_of_classes_that_cannot_be_is_refused(kind: str, num_classes: Any) -> None:
    layout, own = LAYOUTS[kind]((3, 8, 8), "int8"), learned_type(kind)
    with pytest.raises(ConfigError, match="num_classes is 1 to 1000; got"):
        own.choose_layout(20_000, (3, 8, 8), num_classes)
    with pytest.raises(ConfigError, match="num_classes is 1 to 1000; got"):
        own.max_images(layout, 20_000, num_classes)


def test_a_number_of_classes_may_be_numpys_and_have_another_name() -> None:
    layout, four = LAYOUTS["hmn"]((3, 8, 8), "int8"), np.int64(4)
    own: Any = learned_type("hmn")
    assert own.max_images(layout, 20_000, four) == own.max_images(layout, 20_000, 4)
    assert own.file_bytes_of(layout, four, 8, None) == own.file_bytes_of(layout, 4, 8, None)
    assert type(check_num_classes(np.int64(4))) is int  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected_classes is 1 to 1000; got 0"):
        check_num_classes(0, "expected_classes")


# What choose_layout promises, whatever it chooses.


@every_kind
@settings(max_examples=20, deadline=None)
@given(data=st.data(), shape=image_shapes, num_classes=st.integers(1, MAX_CLASSES))
def test_the_smallest_budget_that_does_is_named(
    kind: str, data: st.DataObject, shape: tuple[int, int, int], num_classes: int
) -> None:
    choose = learned_type(kind).choose_layout
    number_format = data.draw(st.sampled_from(PLAIN_FORMATS))
    budget = data.draw(st.integers(1, 300))
    with pytest.raises(BudgetError, match="bytes") as error:
        choose(budget, shape, num_classes, number_format)
    smallest = smallest_named(error)
    layout = choose(smallest, shape, num_classes, number_format)
    assert (layout.image_shape, layout.number_format) == (shape, number_format)
    assert learned_type(kind).max_images(layout, smallest, num_classes) >= num_classes
    with pytest.raises(BudgetError) as error:
        choose(smallest - 1, shape, num_classes, number_format)
    assert smallest_named(error) == smallest


@every_format
@settings(max_examples=10, deadline=None)
@given(shape=image_shapes, num_classes=st.integers(1, MAX_CLASSES), factor=st.floats(1, 3000))
def test_a_layout_holds_each_class_at_any_budget_above(
    kind: str, number_format: str, shape: Sequence[int], num_classes: int, factor: float
) -> None:
    own = learned_type(kind)
    with pytest.raises(BudgetError) as error:
        own.choose_layout(1, shape, num_classes, number_format)
    budget = math.ceil(factor * smallest_named(error))
    layout = own.choose_layout(budget, list(shape), num_classes, number_format)
    assert layout == own.choose_layout(budget, shape, num_classes, number_format)
    assert (layout.image_shape, layout.number_format) == (shape, number_format)
    num_images = own.max_images(layout, budget, num_classes)
    assert num_images >= num_classes
    assert own.file_bytes_of(layout, num_classes, num_images, budget) <= budget


@every_kind
def test_the_default_number_format_is_the_kinds(kind: str) -> None:
    own = learned_type(kind)
    layout = own.choose_layout("100 KiB", (3, 32, 32), 2)
    assert layout.number_format == own.default_number_format
    assert type_of(layout) is own


@pytest.mark.parametrize(("kind", "shape"), [("hmn", (3, 32, 32)), ("features", (64, 2, 2))])
def test_more_bytes_for_an_image_are_fewer_images(kind: str, shape: tuple[int, int, int]) -> None:
    own = learned_type(kind)

    def planned(image_bytes: int | None) -> tuple[int, int]:
        layout = own.choose_layout("100 KiB", shape, 4, image_bytes=image_bytes)
        return layout.image_bytes, own.max_images(layout, "100 KiB", 4)

    least, usual, most = planned(6), planned(None), planned(320)
    assert least[0] == 6 < usual[0] < most[0] == 320
    assert least[1] > usual[1] > most[1]
    # As many as can be are planned, of which about five images of each class still fit.
    assert 4 * 4 < planned(10**6)[1] <= 5 * 4
    # More real images than fit leave the plan as it is.
    assert own.choose_layout("100 KiB", shape, 4, None, 10**6, 320).image_bytes == 320


@every_kind
def test_bytes_are_planned_for_entropy_coded_images_alone(kind: str) -> None:
    with pytest.raises(ConfigError, match="'int8' takes as many bytes for each image"):
        learned_type(kind).choose_layout("100 KiB", (3, 32, 32), 2, "int8", image_bytes=96)
    if learned_type(kind).codes_entropy:
        with pytest.raises(ConfigError, match="image_bytes is 1 or more"):
            learned_type(kind).choose_layout("100 KiB", (3, 32, 32), 2, image_bytes=0)


def test_the_first_layout_that_fits_is_taken() -> None:
    def needed(count: int) -> int:
        layout = HaBaLayout((3, 8, 8), "int8", count)
        return HaBaMemory.file_bytes_of(layout, 3, 3 * count, 9999)

    def chosen(budget: int) -> int:
        layout: HaBaLayout = HaBaMemory.choose_layout(budget, (3, 8, 8), 3)
        return layout.num_hallucinators

    assert chosen(needed(5)) == 5
    assert chosen(needed(5) - 1) == chosen(needed(4)) == 4
    assert chosen(needed(1)) == 1
    with pytest.raises(BudgetError, match=f"the smallest that does is {needed(1):,} bytes"):
        chosen(needed(1) - 1)


def test_padding_of_the_header_costs_no_image() -> None:
    layout = LinBaLayout((3, 17, 22), "int8", num_bases=9, downsampling=1)
    needed = LinBaMemory.file_bytes_of(layout, 1, 392, 14_013)
    assert needed == 14_013
    assert LinBaMemory.max_images(layout, needed, 1) == 392


@pytest.mark.parametrize("kib", [45, 60, 80, 90, 99, 100, 110])
def test_images_are_not_made_poor_for_the_sake_of_a_few_more(kib: int) -> None:
    # 10 of a class, as are planned, fit from 100 KiB on, and all layouts have images of 96 bytes.
    budget = Budget(1024 * kib)
    layout: HMNLayout = HierarchicalMemory.choose_layout(budget, (3, 32, 32), 100)
    smallest = HierarchicalMemory.layouts(budget.num_bytes, (3, 32, 32), "entropy")[-1]
    assert smallest.instance_channels == 1 and layout.instance_channels >= 4
    least = smallest.with_images_of(layout.image_bytes)
    most = HierarchicalMemory.max_images(least, budget, 100)
    assert HierarchicalMemory.max_images(layout, budget, 100) > min(999, 0.94 * most)


# The file.


@every_format
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_what_is_decoded_after_load_is_what_was_decoded_before_save(
    kind: str, number_format: str, data: st.DataObject
) -> None:
    shape = data.draw(st.sampled_from([(1, 8, 8), (3, 9, 13)]))
    labels = data.draw(st.sets(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
    groups = [data.draw(st.integers(1, 4)) for _ in labels]
    memory = made(kind, number_format, shape, sorted(labels), groups)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(data.draw(st.sampled_from([0.0, 1e-6, 1.0, 3.0, 80.0])))
    memory.update_scales()
    size = memory.layout.group_size
    if data.draw(st.booleans()):
        memory.keep([i for i in range(memory.num_images) if i // size % 2 == 0])
    if data.draw(st.booleans()):
        new = data.draw(st.integers().filter(lambda v: v not in labels and abs(v) < 9**18))
        memory.add_classes([new], 2 * size)

    loaded = loads(memory.to_bytes())

    assert isinstance(loaded, LearnedMemory)
    assert loaded.layout == memory.layout
    assert loaded.images_per_class == memory.images_per_class
    (images, own_labels), (wanted, wanted_labels) = loaded.decode(), memory.decode()
    assert same_bits(images, wanted)
    assert own_labels.equal(wanted_labels)
    assert loaded.to_bytes() == memory.to_bytes()


@every_format
def test_a_loaded_memory_goes_on_like_the_one_saved(kind: str, number_format: str) -> None:
    memory = made(kind, number_format, classes=(3, 1), groups=(4, 2), budget=30_000)
    loaded = loads(memory.to_bytes())
    assert isinstance(loaded, LearnedMemory)
    size = memory.layout.group_size
    for one in (memory, loaded):
        one.keep([*range(2 * size), *range(5 * size, 6 * size)])
        one.add_classes([9], 3 * size, seed=1)
    assert same_bits(memory.decode()[0], loaded.decode()[0])
    assert memory.to_bytes() == loaded.to_bytes()


@every_format
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_memory_that_diverged_is_not_saved(kind: str, number_format: str, value: float) -> None:
    for tensor in type(made(kind)).table(LAYOUTS[kind]((3, 8, 8), number_format)):
        memory = made(kind, number_format)
        with torch.no_grad():
            memory.get_parameter(tensor.name).view(-1)[0] = value
        memory.update_scales()
        if float(memory.get_parameter(tensor.name).detach().abs().max()) == 0.5:
            continue  # brought back to the range of pixels
        with pytest.raises(TrainingError, match=r"values .*not finite.*: its training diverged"):
            memory.to_bytes()


@every_format
def test_the_largest_values_that_are_saved_still_decode_to_images(
    kind: str, number_format: str
) -> None:
    refused = 0
    for factor in (1e2, 1e4, 1e6, 1e8):
        memory = made(kind, number_format)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.mul_(factor)
        memory.update_scales()
        try:
            data = memory.to_bytes()
        except TrainingError:
            refused += 1
            continue
        images, _ = loads(data).decode()
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert refused > 0 or kind in ("pixels", "idc")


def test_a_memory_moves_by_the_name_of_a_device() -> None:
    memory = made("hmn")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert memory.to("auto") is memory and memory.classes.device.type == device

"""What holds for every container, the hierarchical memory among them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.data.lookup import ImageLookup
from hmn_replay.errors import BudgetError, ConfigError
from hmn_replay.memory.container_layout import MAX_CLASSES
from hmn_replay.memory.file import serialise
from hmn_replay.memory.formats import PLAIN_FORMATS, NumberFormat
from hmn_replay.memory.registry import make_container
from tests.support import LAYOUTS, made, same_bits, trained

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_container = pytest.mark.parametrize("container", LAYOUTS)
every_format = pytest.mark.parametrize("number_format", PLAIN_FORMATS)
grouped = pytest.mark.parametrize("container", ["idc", "haba"])


# decode


@every_container
@every_format
def test_images_are_float32_in_the_unit_interval(
    container: str, number_format: NumberFormat
) -> None:
    memory = made(container, number_format)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(1000)
    memory.update_scales()
    images, labels = memory.decode()
    assert images.dtype == torch.float32
    assert images.shape == (memory.num_images, 3, 8, 8)
    assert images.is_contiguous()
    assert not images.requires_grad
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7] * memory.images_per_class[0] + [-3] * memory.images_per_class[1]


@every_container
@every_format
def test_what_is_decoded_is_what_training_sees(container: str, number_format: NumberFormat) -> None:
    memory = made(container, number_format, image_shape=(1, 9, 14))
    seen = memory(torch.arange(memory.num_images)).detach()
    torch.testing.assert_close(memory.decode()[0], seen, rtol=0, atol=2e-6)


@every_container
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_all_images_may_be_decoded_when_they_are_asked_for(
    container: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = made(container)
    images, _ = memory.decode(dtype=dtype)
    num_bytes = images.numel() * dtype.itemsize
    for kept_bytes, kind in ((num_bytes, Tensor), (num_bytes - 1, ImageLookup)):
        monkeypatch.setattr("hmn_replay.memory.base._KEPT_BYTES", kept_bytes)
        decoded = memory.decoded(dtype)
        assert isinstance(decoded, kind)
        assert (decoded.shape, decoded.dtype) == (images.shape, dtype)
        assert same_bits(decoded[:], images)
        assert same_bits(decoded[torch.tensor([3, 0])], images[[3, 0]])


@every_container
def test_bytes_are_the_rounded_floats(container: str) -> None:
    memory = made(container)
    floats, labels = memory.decode()
    pixels, own_labels = memory.decode(dtype=torch.uint8)
    assert pixels.dtype == torch.uint8
    assert pixels.equal((floats * 255).round().to(torch.uint8))
    assert own_labels.equal(labels)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"float32 or torch\.uint8; got torch\.float16"):
        made("raw").decode(dtype=torch.float16)


@every_container
@every_format
def test_the_bits_of_an_image_do_not_depend_on_its_company(
    container: str, number_format: NumberFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = made(container, number_format, (3, 12, 20), classes=(0, 1, 2), groups=(5, 6, 7))
    monkeypatch.setattr("hmn_replay.memory.base._PIXELS_PER_CHUNK", 4 * 12 * 20)  # four at a time
    images, labels = memory.decode()
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 4, 5, 9, 18):
        chosen = torch.randperm(memory.num_images, generator=generator)[:count]
        some, some_labels = memory.decode(chosen)
        assert same_bits(some, images[chosen])
        assert some_labels.equal(labels[chosen])
    twice, _ = memory.decode(torch.tensor([3, 3]))
    assert same_bits(twice, images[[3, 3]])


@every_container
@pytest.mark.parametrize("num_threads", [1, 5])
def test_an_image_may_stand_anywhere(container: str, num_threads: int) -> None:
    """SIMD code leaves what does not fill a register to other code, threads where they part too."""
    memory = made(container, "float32", (3, 12, 21), classes=(0, 1, 2), groups=(3, 300, 20))
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


@every_container
def test_no_image_at_all_is_fine(container: str) -> None:
    memory = made(container)
    images, labels = memory.decode(torch.tensor([], dtype=torch.int64))
    assert images.shape == (0, 3, 8, 8)
    assert labels.shape == (0,)
    memory.keep([])
    memory.update_scales()
    assert memory.images_per_class == [0, 0]
    assert memory.decode()[0].shape == (0, 3, 8, 8)
    assert len(serialise(memory)) == memory.file_bytes


@pytest.mark.parametrize(
    "indices", [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4], dtype=np.int32), range(4, -1, -2), []]
)
def test_images_may_be_named_by_any_sequence(indices: Any) -> None:
    memory = made("hmn")
    whole, labels = memory.decode()
    chosen = torch.tensor([int(index) for index in indices], dtype=torch.int64)
    images, own_labels = memory.decode(indices)
    assert same_bits(images, whole[chosen])
    assert own_labels.equal(labels[chosen])


@pytest.mark.parametrize("indices", [[-1], [0, 99], [True, False], [0.5]])
def test_decode_refuses_what_is_no_position(indices: list[int]) -> None:
    with pytest.raises(ConfigError, match="indices are"):
        made("hmn").decode(indices)


@every_container
def test_decoding_is_done_in_chunks_of_bounded_size(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = made(container, groups=(2, 8))
    sizes: list[int] = []
    decode_chunk = memory._decode_chunk

    def watched(indices: Tensor) -> Tensor:
        sizes.append(len(indices))
        return decode_chunk(indices)

    monkeypatch.setattr(memory, "_decode_chunk", watched)
    monkeypatch.setattr("hmn_replay.memory.base._PIXELS_PER_CHUNK", 200)  # of 64 an image
    memory.decode()
    assert sizes == [3] * -(-memory.num_images // 3)
    monkeypatch.setattr("hmn_replay.memory.base._PIXELS_PER_CHUNK", 1)
    sizes.clear()
    memory.decode([2, 0])
    assert sizes == [1, 1]


@every_container
@every_format
def test_decoding_does_not_depend_on_autocast(container: str, number_format: NumberFormat) -> None:
    memory = made(container, number_format)
    images, _ = memory.decode()
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(memory.decode()[0], images)


@every_container
@every_format
def test_decoding_leaves_modes_flags_and_gradients(
    container: str, number_format: NumberFormat
) -> None:
    memory = made(container, number_format).eval()
    frozen = next(iter(memory.parameters())).requires_grad_(False)
    memory.decode()
    assert not memory.training
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in memory.parameters() if p is not frozen)
    assert all(parameter.grad is None for parameter in memory.parameters())


# Gradients.


@every_container
@every_format
def test_gradients_reach_every_value(container: str, number_format: NumberFormat) -> None:
    layout = LAYOUTS[container]((3, 9, 14), number_format)
    counts = [2 * layout.group_size, layout.group_size]
    memory = trained(make_container(layout, [0, 1], counts), std=0.05)
    images = memory(torch.arange(memory.num_images))
    weights = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    torch.autograd.backward(images, weights)
    for name, parameter in memory.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        # All but what decodes to pixels beyond black and white.
        assert float((parameter.grad != 0).float().mean()) > 0.9, name


@every_container
def test_gradients_are_those_of_the_images_decoded(container: str) -> None:
    """In float32, where rounding is no step, against finite differences."""
    layout = LAYOUTS[container]((3, 8, 8), "float32")
    memory = make_container(layout, [0, 1], [2 * layout.group_size, layout.group_size]).double()
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


@every_container
@every_format
def test_a_step_asks_its_device_for_nothing(container: str, number_format: NumberFormat) -> None:
    """Tensors of the meta device have no values: who asks for one, or mixes devices, fails."""
    memory = made(container, number_format).to("meta")
    images = memory(torch.tensor([0, 3], device="meta"))
    assert images.shape == (2, 3, 8, 8)
    torch.autograd.backward(images.sum())
    for first_class in (0, 1):
        memory.update_scales(first_class)
    assert all(tensor.is_meta for tensor in memory.state_dict().values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_container
@every_format
def test_a_container_on_a_gpu_is_the_same(container: str, number_format: NumberFormat) -> None:
    memory = made(container, number_format)
    images, labels = memory.decode()
    moved = copy.deepcopy(memory).to("cuda")
    own_images, own_labels = moved.decode()
    torch.testing.assert_close(own_images.cpu(), images, rtol=0, atol=1e-5)
    assert own_labels.cpu().equal(labels)
    size = memory.layout.group_size
    for one in (memory, moved):
        one.extend([1], 2 * size)
        one.keep(range(size, one.num_images))
        one.remove([7])
        one.fit(size, lambda positions: torch.full((len(positions), 3, 8, 8), 0.3))
        one.update_scales(first_class=1)
    # Least squares round otherwise on another device.
    if container != "linba":
        assert serialise(moved) == serialise(memory)
    torch.testing.assert_close(moved.decode()[0].cpu(), memory.decode()[0], rtol=0, atol=0.02)


@every_container
def test_what_classes_share_can_be_frozen(container: str) -> None:
    memory = made(container)
    memory.freeze_shared()
    learned = {name for name, p in memory.named_parameters() if p.requires_grad}
    assert learned >= set(memory.private)
    assert learned <= {*memory.class_rows, *memory.group_rows}


# keep, extend, remove


@every_container
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_keep_changes_no_image_by_one_bit(container: str, data: st.DataObject) -> None:
    number_format = data.draw(st.sampled_from(PLAIN_FORMATS))
    groups = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    memory = made(container, number_format, (3, 10, 14), range(len(groups)), groups)
    images, labels = memory.decode()
    size = memory.layout.group_size
    chosen = data.draw(st.sets(st.integers(0, sum(groups) - 1)))
    kept = [size * group + j for group in chosen for j in range(size)]
    kept = data.draw(st.permutations(kept))

    memory.keep(torch.tensor(kept, dtype=torch.int64) if data.draw(st.booleans()) else kept)

    stays = sorted(kept)
    assert memory.num_images == len(kept)
    assert memory.num_classes == len(groups)
    left, left_labels = memory.decode()
    assert same_bits(left, images[stays])
    assert left_labels.equal(labels[stays])
    assert memory.images_per_class == [
        sum(int(labels[i]) == c for i in stays) for c in range(len(groups))
    ]
    assert len(serialise(memory)) == memory.file_bytes


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 6], "positions from 0 to 5; got 0 to 6"), ([1, 3, 1], "each index may come once")],
)
def test_keep_refuses_what_is_no_set_of_positions(indices: list[int], message: str) -> None:
    memory = made("hmn", groups=(3, 3))
    with pytest.raises(ConfigError, match=message):
        memory.keep(indices)
    assert memory.num_images == 6


@grouped
def test_images_that_share_values_stay_or_go_together(container: str) -> None:
    memory = made(container)
    size = memory.layout.group_size
    images, _ = memory.decode()
    whole = list(range(size, 2 * size))
    for part in (whole[:-1], whole[1:], [*whole, 0], [i - 1 for i in whole]):
        with pytest.raises(ConfigError, match=f"groups of {size} that share stored values"):
            memory.keep(part)
    assert same_bits(memory.decode()[0], images)
    memory.keep(whole[::-1])
    assert same_bits(memory.decode()[0], images[whole])


@grouped
def test_images_that_share_values_come_together(container: str) -> None:
    memory = made(container)
    size = memory.layout.group_size
    for counts in (size + 1, [size, 1], 1):
        with pytest.raises(ConfigError, match=f"images come in groups of {size}"):
            memory.extend([1, 2], counts)
        with pytest.raises(ConfigError, match=f"images come in groups of {size}"):
            make_container(memory.layout, [1, 2], counts)


@every_container
@every_format
def test_extend_leaves_every_old_image_as_it_was(
    container: str, number_format: NumberFormat
) -> None:
    memory = made(container, number_format, classes=(4, -9), groups=(3, 2))
    size, num_old = memory.layout.group_size, memory.num_images
    images, _ = memory.decode()
    memory.extend([10**12, 0], [2 * size, 4 * size], seed=3)
    assert memory.classes.tolist() == [4, -9, 10**12, 0]
    assert memory.images_per_class == [3 * size, 2 * size, 2 * size, 4 * size]
    grown, labels = memory.decode()
    assert same_bits(grown[:num_old], images)
    assert labels[num_old:].tolist() == [10**12] * (2 * size) + [0] * (4 * size)
    assert len(grown.unique(dim=0)) == memory.num_images
    memory.keep(range(2 * size, memory.num_images))
    memory.extend(torch.tensor([77]), size)
    assert same_bits(memory.decode()[0][:-size], grown[2 * size :])


@every_container
def test_scales_of_the_classes_before_stay(container: str) -> None:
    memory = made(container, classes=(0, 1, 2), groups=(2, 2, 2))
    before = copy.deepcopy(dict(memory.named_buffers()))
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.mul_(3)
    memory.update_scales(first_class=2)
    for name, after in memory.named_buffers():
        if name not in memory.class_rows:
            assert after.equal(before[name]), name
        else:
            assert after[:2].equal(before[name][:2]), name
            torch.testing.assert_close(after[2:], 3 * before[name][2:])


@every_container
def test_new_classes_that_learn_leave_old_images_as_they_were(container: str) -> None:
    """As a condensation does it: shared values frozen, scales of old classes left alone."""
    memory = made(container)
    images, _ = memory.decode()
    memory.extend([1, 2], memory.layout.group_size)
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


@every_container
def test_extend_depends_on_its_seed_and_not_on_how_often_it_is_called(container: str) -> None:
    memories = [made(container) for _ in range(3)]
    for memory, seed in zip(memories, (5, 5, 6), strict=True):
        memory.extend([1], memory.layout.group_size, seed=seed)
    one, two, other = (memory.decode()[0] for memory in memories)
    assert same_bits(one, two)
    assert not one.equal(other)


@every_container
def test_extend_that_fails_changes_nothing(container: str) -> None:
    memory = made(container)
    size = memory.layout.group_size
    memory.budget_bytes = memory.layout.file_bytes(3, memory.num_images + size, 10_000)
    before = copy.deepcopy(memory.state_dict())
    too_many = memory.num_images + 3 * size
    with pytest.raises(BudgetError, match=rf"{too_many} images of 3 classes take .*over the bud"):
        memory.extend([2], 3 * size)
    with pytest.raises(ConfigError, match=r"classes \[7\] are in the memory already"):
        memory.extend([2, 7], size)
    with pytest.raises(ConfigError, match="an integer of 0 or more, or 1 of them"):
        memory.extend([2], [size, size])
    after = memory.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


@every_container
@every_format
def test_removing_classes_changes_no_other_image(
    container: str, number_format: NumberFormat
) -> None:
    memory = made(container, number_format, classes=(5, -2, 9, 7), groups=(3, 2, 0, 4))
    before, labels = memory.decode()
    memory.remove([-2, 9])
    after, left = memory.decode()
    size = memory.layout.group_size
    assert memory.classes.tolist() == [5, 7]
    assert memory.images_per_class == [3 * size, 4 * size]
    assert left.tolist() == [5] * (3 * size) + [7] * (4 * size)
    assert same_bits(after, before[(labels == 5) | (labels == 7)])
    assert len(serialise(memory)) == memory.file_bytes


def test_what_cannot_be_removed_is_refused() -> None:
    memory = made("hmn", classes=(5, 6))
    for classes, message in (([7], "not in the memory"), ([5, 6], "1 class or more"), ([], "1 to")):
        with pytest.raises(ConfigError, match=message):
            memory.remove(classes)
    assert memory.classes.tolist() == [5, 6]


@every_container
def test_changes_of_shape_leave_the_flags(container: str) -> None:
    memory = made(container, classes=(5, 3, 4), groups=(2, 2, 2))
    size = memory.layout.group_size
    frozen = set(memory.private)
    for name in frozen:
        memory.get_parameter(name).requires_grad_(False)
    memory.keep(range(2 * size, 6 * size))
    memory.extend([9], size)
    memory.remove([5])
    assert {name for name, p in memory.named_parameters() if not p.requires_grad} == frozen


@every_container
def test_a_copy_is_independent(container: str) -> None:
    memory = made(container)
    images, _ = memory.decode()
    other = copy.deepcopy(memory)
    other.keep([])
    other.extend([2], memory.layout.group_size)
    assert same_bits(memory.decode()[0], images)


# Classes, counts, values.


@every_container
def test_a_class_may_be_without_images(container: str) -> None:
    memory = made(container, classes=(0, 1, 2), groups=(1, 0, 2))
    size = memory.layout.group_size
    assert memory.images_per_class == [size, 0, 2 * size]
    assert memory.decode()[1].tolist() == [0] * size + [2] * (2 * size)
    assert all(bool((scale > 0).all()) for scale in memory.scales())


def test_a_memory_holds_a_thousand_classes_and_no_more() -> None:
    memory = made("linba", classes=range(MAX_CLASSES), groups=[1] * MAX_CLASSES)
    assert memory.num_classes == MAX_CLASSES
    with pytest.raises(ConfigError, match=r"up to 1000 classes; got 1000 \+ 1"):
        memory.extend([-1], 1)
    with pytest.raises(ConfigError, match="1 to 1000 classes; got 1001"):
        make_container(memory.layout, range(MAX_CLASSES + 1), 1)


def test_classes_and_counts_that_cannot_be_are_refused() -> None:
    layout = LAYOUTS["hmn"]((3, 8, 8), "int8")
    with pytest.raises(ConfigError, match="classes come once each"):
        make_container(layout, [1, 2, 1], 1)
    with pytest.raises(ConfigError, match="integer of 0 or more, or 2 of them; got -1"):
        make_container(layout, [1, 2], -1)


def test_labels_may_be_any_integers_of_64_bits() -> None:
    ends = [2**63 - 1, -(2**63)]
    memory = made("hmn", classes=ends, groups=(1, 1))
    assert memory.classes.tolist() == ends
    with pytest.raises(ConfigError, match="integers of 64 bits"):
        memory.extend([2**63], 1)
    assert memory.decode()[1].tolist() == ends


def test_integers_of_numpy_and_torch_are_integers() -> None:
    layout = LAYOUTS["hmn"]((3, 8, 8), "int8")
    expected = make_container(layout, [7, -3], 2)
    given_ones: list[tuple[Any, Any]] = [
        (np.array([7, -3]), np.int64(2)),
        ([np.int8(7), np.int64(-3)], np.array([2, 2])),
        (torch.tensor([7, -3]), [np.uint8(2), 2]),
        ([7, -3], torch.tensor(2)),
    ]
    for classes, counts in given_ones:
        memory = make_container(layout, classes, counts)
        assert memory.classes.equal(expected.classes)
        assert memory.images_per_class == [2, 2]
        assert same_bits(memory.decode()[0], expected.decode()[0])


@every_container
def test_a_memory_over_its_budget_is_refused(container: str) -> None:
    memory = made(container)
    layout, counts = memory.layout, memory.images_per_class
    budget = layout.file_bytes(2, sum(counts), 5000)
    assert type(memory)(layout, [0, 1], counts, budget=budget).file_bytes == budget
    with pytest.raises(BudgetError, match=f"over the budget of {budget - 1:,}; keep fewer"):
        type(memory)(layout, [0, 1], counts, budget=budget - 1)


@every_container
def test_counts_and_sizes_are_told(container: str) -> None:
    memory = made(container, classes=(5, 3), groups=(4, 1))
    size = memory.layout.group_size
    assert (memory.num_classes, memory.num_images) == (2, 5 * size)
    assert memory.image_shape == (3, 8, 8)
    assert memory.labels.tolist() == [5] * (4 * size) + [3] * size
    assert memory.images_per_class == [4 * size, size]
    assert memory.num_floats == sum(parameter.numel() for parameter in memory.parameters())
    assert memory.file_bytes == memory.layout.file_bytes(2, 5 * size, None)
    assert memory.budget_bytes is None
    assert type(memory)(memory.layout, [0], size, budget="1 MiB").budget_bytes == 2**20


@every_container
def test_the_seed_gives_the_values(container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    one, two, other = (
        make_container(layout, [0, 1], 2 * layout.group_size, seed=seed) for seed in (1, 1, 2)
    )
    assert serialise(one) == serialise(two)
    assert not one.decode()[0].equal(other.decode()[0])


@every_container
def test_values_do_not_depend_on_the_default_dtype(container: str) -> None:
    layout = LAYOUTS[container]((3, 8, 8), "int8")
    wanted = make_container(layout, [5, 3], layout.group_size)
    torch.set_default_dtype(torch.float64)
    try:
        memory = make_container(layout, [5, 3], layout.group_size)
        assert same_bits(memory.decode()[0], wanted.decode()[0])
        assert serialise(memory) == serialise(wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in memory.state_dict().items():
        assert value.dtype == wanted.state_dict()[name].dtype

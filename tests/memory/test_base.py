"""What holds for every memory kind, be its images learned or real."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay.baselines.fill import raw_images
from hmn_replay.budget import Budget
from hmn_replay.condensation.condense import condense
from hmn_replay.data.images import LabelledImages, as_labelled_images
from hmn_replay.data.lookup import ImageLookup
from hmn_replay.errors import BudgetError, ConfigError, DataError, MemoryFileError
from hmn_replay.memory import MEMORIES, LearnedMemory, Memory, load, loads
from hmn_replay.memory.checks import check_classes, check_counts, check_image_shape, check_indices
from hmn_replay.memory.names import affordable_names
from tests.support import CODECS, KINDS, REAL, any_memory, made, real, same_bits

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_kind = pytest.mark.parametrize("kind", KINDS)

NAMES = {-3: "Straßenbahn", 7: "cat"}


def group_size(memory: Memory) -> int:
    return memory.layout.group_size if isinstance(memory, LearnedMemory) else 1


def state_of(memory: Memory) -> dict[str, bytes]:
    """Return what a memory stores, to the bit."""
    return {name: tensor.numpy().tobytes() for name, tensor in memory.stored().items()}


# What a memory says of itself.


@every_kind
def test_a_memory_counts_its_images_classes_and_bytes(kind: str) -> None:
    memory = any_memory(kind)
    size = group_size(memory)
    counts = memory.images_per_class
    assert memory.kind == kind
    assert memory.image_shape == (3, 8, 8)
    assert (memory.num_classes, memory.num_images, len(memory)) == (2, 5 * size, 5 * size)
    assert sorted(counts) == [2 * size, 3 * size]
    assert memory.classes.dtype == memory.class_index.dtype == torch.int64
    assert memory.class_index.tolist() == [0] * counts[0] + [1] * counts[1]
    assert memory.labels.equal(memory.classes[memory.class_index])
    assert memory.file_bytes == len(memory.to_bytes())
    assert memory.budget_bytes is None
    assert (memory.report, memory.class_names, memory.names_bytes) == ({}, {}, 0)


@every_kind
def test_a_memory_is_shown_by_kind_images_and_bytes(kind: str) -> None:
    memory = any_memory(kind)
    text = repr(memory)
    assert f"(kind={kind!r}, {len(memory)} images of 2 classes, image_shape=(3, 8, 8), " in text
    assert f"{memory.file_bytes:,} bytes" in text
    memory.budget_bytes = 12_345
    assert f"{memory.file_bytes:,} of 12,345 bytes" in repr(memory)


@every_kind
def test_a_summary_is_json_and_says_what_the_memory_is(kind: str) -> None:
    memory = any_memory(kind)
    memory.class_names = {7: "cat"}
    summary = memory.summary()
    assert json.loads(json.dumps(summary)) == summary
    wanted = {
        "kind": kind,
        "image_shape": [3, 8, 8],
        "num_classes": 2,
        "num_images": len(memory),
        "classes": memory.classes.tolist(),
        "class_names": [{7: "cat"}.get(label) for label in memory.classes.tolist()],
        "images_per_class": memory.images_per_class,
        "budget_bytes": None,
        "file_bytes": memory.file_bytes,
        "bits": memory.bits(),
    }
    assert wanted.items() <= summary.items()


@every_kind
def test_bits_are_most_of_the_file(kind: str) -> None:
    memory = any_memory(kind, **({"counts": (90, 80)} if kind in REAL else {"groups": (90, 80)}))
    in_bytes = sum(memory.bits().values()) / 8
    assert 0.5 * memory.file_bytes < in_bytes < memory.file_bytes


# decode


@every_kind
def test_images_are_floats_in_the_unit_interval_or_bytes(kind: str) -> None:
    memory = any_memory(kind)
    images, labels = memory.decode()
    assert (images.dtype, images.shape) == (torch.float32, (len(memory), 3, 8, 8))
    assert images.is_contiguous()
    assert not images.requires_grad
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert labels.dtype == torch.int64
    assert labels.equal(memory.labels)
    pixels, own_labels = memory.decode(dtype=torch.uint8)
    assert pixels.dtype == torch.uint8
    assert pixels.equal((images * 255).round().to(torch.uint8))
    assert own_labels.equal(labels)


@every_kind
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_the_bits_of_an_image_do_not_depend_on_its_company(kind: str, data: st.DataObject) -> None:
    memory = any_memory(kind)
    images, labels = memory.decode()
    chosen = data.draw(st.lists(st.integers(0, len(memory) - 1), max_size=9))
    some, some_labels = memory.decode(chosen)
    assert same_bits(some, images[chosen])
    assert some_labels.tolist() == labels[chosen].tolist()


@every_kind
def test_images_may_be_named_by_any_sequence(kind: str) -> None:
    memory = any_memory(kind)
    whole, labels = memory.decode()
    names: list[Any] = [[4, 0, 4], (4, 0, 4), np.array([4, 0, 4], np.int32), range(4, -1, -2), []]
    for indices in (*names, torch.tensor([4, 0])):
        chosen = [int(index) for index in indices]
        images, own_labels = memory.decode(indices)
        assert same_bits(images, whole[chosen])
        assert own_labels.equal(labels[chosen])


@every_kind
@pytest.mark.parametrize("indices", [[-1], [0, 99], [True, False], [0.5], "01"])
def test_decode_refuses_what_is_no_position(kind: str, indices: Any) -> None:
    with pytest.raises(ConfigError, match="indices are"):
        any_memory(kind).decode(indices)


@every_kind
def test_decode_refuses_other_dtypes(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"dtype is torch\.float32 or torch\.uint8; got torch\.f"):
        any_memory(kind).decode(dtype=torch.float16)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_all_images_are_decoded_at_once_where_they_are_few(kind: str, dtype: torch.dtype) -> None:
    memory = any_memory(kind)
    decoded = memory.decoded(dtype)
    assert isinstance(decoded, Tensor)
    assert same_bits(decoded, memory.decode(dtype=dtype)[0])


def test_very_many_images_are_decoded_when_they_are_asked_for() -> None:
    """Over 1 GiB in all, of which the memory itself has a byte for each."""
    memory = made("linba", image_shape=(3, 224, 224), groups=(1000, 784))
    assert memory.num_images * 3 * 224 * 224 * 4 > 2**30 > memory.num_images * 3 * 224 * 224
    decoded = memory.decoded()
    assert isinstance(decoded, ImageLookup)
    assert (decoded.shape, decoded.dtype) == ((1784, 3, 224, 224), torch.float32)
    chosen = torch.tensor([1783, 0])
    assert same_bits(decoded[chosen], memory.decode(chosen)[0])


@every_kind
def test_a_data_set_has_images_labels_and_targets(kind: str) -> None:
    memory = any_memory(kind)
    images, labels = memory.decode()
    dataset = memory.as_dataset()
    assert len(dataset) == len(memory)
    assert dataset.targets == labels.tolist()
    assert repr(dataset) == (
        f"DecodedDataset({len(memory)} images of {memory.num_classes} classes, "
        f"image_shape={memory.image_shape})"
    )
    for index in range(len(memory)):
        image, label = dataset[index]
        assert isinstance(image, Tensor)
        assert image.equal(images[index])
        assert label == dataset.targets[index]
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, generator=torch.Generator())
    assert torch.cat([batch for batch, _ in loader]).equal(images)


@every_kind
def test_a_data_set_transforms_an_image_each_time_that_it_is_read(kind: str) -> None:
    calls = itertools.count()
    dataset = any_memory(kind).as_dataset(lambda x: (x.dtype, next(calls)), dtype=torch.uint8)
    label = dataset.targets[1]
    assert repr(dataset).startswith(f"DecodedDataset({len(dataset)} images of ")
    assert repr(dataset).endswith("<lambda>)")
    assert dataset[1] == ((torch.uint8, 0), label)
    assert dataset[1] == ((torch.uint8, 1), label)


# keep and remove


@every_kind
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_keep_changes_no_image_by_one_bit(kind: str, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    own = {"counts": counts} if kind in REAL else {"groups": counts}
    memory = any_memory(kind, classes=range(len(counts)), image_shape=(3, 10, 14), **own)
    size = group_size(memory)
    images, labels = memory.decode()
    chosen = data.draw(st.sets(st.integers(0, sum(counts) - 1)))
    kept = data.draw(st.permutations([size * group + j for group in chosen for j in range(size)]))

    memory.keep(torch.tensor(kept, dtype=torch.int64) if data.draw(st.booleans()) else kept)

    stays = sorted(kept)
    assert (memory.num_images, memory.num_classes) == (len(kept), len(counts))
    left, left_labels = memory.decode()
    assert same_bits(left, images[stays])
    assert left_labels.equal(labels[stays])
    assert memory.images_per_class == [left_labels.tolist().count(c) for c in range(len(counts))]
    assert len(memory.to_bytes()) == memory.file_bytes


@every_kind
@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 99], "positions from 0 to .*; got 0 to 99"), ([1, 3, 1], "each index may occur once")],
)
def test_keep_refuses_what_is_no_set_of_positions(
    kind: str, indices: list[int], message: str
) -> None:
    memory = any_memory(kind)
    before = state_of(memory)
    with pytest.raises(ConfigError, match=message):
        memory.keep(indices)
    assert state_of(memory) == before
    assert memory.num_images == 5 * group_size(memory)


@every_kind
def test_removing_classes_changes_no_other_image(kind: str) -> None:
    counts = (3, 2, 1, 4)
    own = {"counts": counts} if kind in REAL else {"groups": counts}
    memory = any_memory(kind, classes=(-2, 5, 7, 9), **own)
    memory.class_names = {5: "five", 7: "seven"}
    size, (before, labels) = group_size(memory), memory.decode()
    memory.remove([-2, 7])
    after, left = memory.decode()
    assert memory.classes.tolist() == [5, 9]
    assert memory.images_per_class == [2 * size, 4 * size]
    assert left.tolist() == [5] * (2 * size) + [9] * (4 * size)
    assert same_bits(after, before[(labels == 5) | (labels == 9)])
    assert len(memory.to_bytes()) == memory.file_bytes
    assert memory.class_names == loads(memory.to_bytes()).class_names == {5: "five"}


@every_kind
@pytest.mark.parametrize(
    ("classes", "message"),
    [([3], "not in the memory"), ([-3, 7], "1 class or more"), ([], "1 to"), ([7, 7], "once")],
)
def test_what_cannot_be_removed_is_refused(kind: str, classes: list[int], message: str) -> None:
    memory = any_memory(kind)
    before = state_of(memory)
    with pytest.raises(ConfigError, match=message):
        memory.remove(classes)
    assert state_of(memory) == before
    assert sorted(memory.classes.tolist()) == [-3, 7]


@every_kind
def test_a_memory_without_any_image_is_a_memory(kind: str) -> None:
    memory = any_memory(kind)
    memory.keep([])
    assert memory.images_per_class == [0, 0]
    for one in (memory, loads(memory.to_bytes())):
        assert len(one.to_bytes()) == one.file_bytes
        images, labels = one.decode()
        assert (images.shape, labels.shape) == ((0, 3, 8, 8), (0,))
        assert len(one.as_dataset()) == 0
        assert one.images_per_class == [0, 0]


@every_kind
def test_a_copy_is_independent(kind: str) -> None:
    memory = any_memory(kind)
    before = state_of(memory)
    other = copy.deepcopy(memory)
    other.keep([])
    other.remove([7])
    other.class_names[-3] = "other"
    assert state_of(memory) == before
    assert memory.class_names == {}


# Files: in tests/memory/test_file.py is what no memory kind knows of.


@every_kind
def test_a_file_gives_back_what_was_saved(kind: str, tmp_path: Path) -> None:
    memory = any_memory(kind)
    memory.budget_bytes, memory.class_names = 20_000, dict(NAMES)
    path = tmp_path / "memory.hmn"
    memory.save(path)
    assert path.stat().st_size == memory.file_bytes
    for loaded in (load(path), load(str(path), device="cpu"), loads(path.read_bytes())):
        assert type(loaded) is type(memory)
        assert loaded.classes.equal(memory.classes)
        assert loaded.class_index.equal(memory.class_index)
        assert loaded.images_per_class == memory.images_per_class
        assert (loaded.budget_bytes, loaded.class_names) == (20_000, NAMES)
        assert loaded.file_bytes == memory.file_bytes
        for dtype in (torch.float32, torch.uint8):
            assert same_bits(loaded.decode(dtype=dtype)[0], memory.decode(dtype=dtype)[0])
        assert loaded.to_bytes() == memory.to_bytes() == path.read_bytes()
        assert loaded.summary() == memory.summary()


@every_kind
def test_a_memory_over_its_budget_is_not_saved(kind: str, tmp_path: Path) -> None:
    memory, path = any_memory(kind), tmp_path / "memory.hmn"
    memory.budget_bytes = 200
    path.write_bytes(b"old")
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes, over its budget of 200; call"):
        memory.save(path)
    assert path.read_bytes() == b"old"
    memory.budget_bytes = 9999
    memory.budget_bytes = memory.file_bytes
    memory.save(path)
    assert path.stat().st_size == memory.file_bytes <= memory.budget_bytes


@every_kind
def test_a_damaged_file_is_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.hmn"
    data = any_memory(kind).to_bytes()
    for damaged in (b"", data[:-1], data + b"0", data[:-1] + bytes([data[-1] ^ 7])):
        path.write_bytes(damaged)
        with pytest.raises(MemoryFileError, match=r"cannot read '.*damaged\.hmn': "):
            load(path)
        with pytest.raises(MemoryFileError, match="cannot read the bytes of a memory: "):
            loads(damaged)


def test_a_device_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        loads(made("hmn").to_bytes(), device="nowhere")
    with pytest.raises(ConfigError, match="device 'nowhere' cannot be used"):
        load(tmp_path / "absent", device="nowhere")


# Class names.


@every_kind
def test_names_take_the_bytes_that_are_counted(kind: str) -> None:
    memory = any_memory(kind)
    without = memory.file_bytes
    memory.class_names = {7: "a cat, of which there is one"}
    assert 0 < memory.names_bytes < memory.file_bytes - without
    assert len(memory.to_bytes()) == memory.file_bytes
    assert loads(memory.to_bytes()).class_names == memory.class_names


@settings(max_examples=30, deadline=None)
@given(names=st.dictionaries(st.sampled_from([-3, 7, 99]), st.text(max_size=20)))
def test_any_text_is_a_name_but_the_empty_one(names: dict[int, str]) -> None:
    memory = real("raw")
    memory.class_names = names
    loaded = loads(memory.to_bytes())
    assert loaded.class_names == {k: name for k, name in names.items() if name and k != 99}


# Registration.


@pytest.mark.parametrize("name", ["HMN", "", "dsa", None])
def test_an_unknown_kind_is_refused_with_those_there_are(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"memory kind must be one of {', '.join(MEMORIES)}; got"):
        MEMORIES[name]


@every_kind
def test_a_kind_is_known_by_its_name(kind: str) -> None:
    assert MEMORIES[kind].kind == kind
    with pytest.raises(ConfigError, match=f"there is a memory kind '{kind}' already"):
        MEMORIES.add(kind, MEMORIES[kind])


# What users give: labels, positions, counts, shapes.


@pytest.mark.parametrize(
    "classes", [[7, -3], (7, -3), np.array([7, -3]), torch.tensor([7, -3]), [np.int8(7), -3]]
)
def test_labels_of_any_type_become_a_list(classes: Any) -> None:
    found = check_classes(classes)
    assert found == [7, -3]
    assert all(type(label) is int for label in found)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "1 to 1000 classes; got 0"),
        (range(1001), "1 to 1000 classes; got 1001"),
        ([1, 2, 1], "each class may occur once"),
        ([1.0, 2.0], r"classes are integers of 64 bits; got \[1.0, 2.0\]"),
        (["cat"], "classes are integers"),
        ([True, False], "classes are integers"),
        (torch.tensor([0.5]), "classes are integers"),
        (5, "classes are a sequence of integers"),
        (None, "classes are a sequence of integers"),
        (torch.tensor(5), "classes are a sequence of integers"),
        ([0, 2**63], r"integers of 64 bits; got \[0, 9223372036854775808\]"),
        ([-(2**63) - 1], "integers of 64 bits"),
        (np.array([2**63], dtype=np.uint64), "integers of 64 bits"),
    ],
)
def test_what_are_no_labels_is_refused(classes: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_classes(classes)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], "positions from 0 to 5; got 0 to 6"),
        ([-1, 2], "positions from 0 to 5; got -1 to 2"),
        ([0.0, 1.5], r"indices are integers; got torch\.float32"),
        ([True, False], r"indices are integers; got torch\.bool: pass mask\.nonzero"),
        (None, "indices are integers; got None"),
        ("01", "indices are integers; got '01'"),
    ],
)
def test_what_are_no_positions_is_refused(indices: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_indices(indices, 6)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        (4, [4, 4]),
        (0, [0, 0]),
        (np.int64(2), [2, 2]),
        (torch.tensor(2), [2, 2]),
        ([4, 0], [4, 0]),
        (np.array([2, 6]), [2, 6]),
    ],
)
def test_one_count_is_for_all_classes(counts: Any, found: list[int]) -> None:
    assert check_counts(counts, 2, 2) == found


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (1.0, "integer of 0 or more, or 2 of them; got 1.0"),
        (True, "integer of 0 or more, or 2 of them; got True"),
        (None, "integer of 0 or more, or 2 of them; got None"),
        (-1, "integer of 0 or more, or 2 of them; got -1"),
        ([1], r"or 2 of them; got \[1\]"),
        ([1, -1], r"or 2 of them; got \[1, -1\]"),
        ([1, 1.5], r"or 2 of them; got \[1, 1.5\]"),
        ([2, 3], r"2 images share stored values, so .* is a multiple of 2; got \[2, 3\]"),
        (1, "2 images share stored values"),
    ],
)
def test_what_are_no_counts_is_refused(counts: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_counts(counts, 2, 2)


@pytest.mark.parametrize(
    "shape",
    [(2, 8, 8), (3, 0, 8), (3, 8, -8), (3, 8), (3, 8, 8, 8), (True, 8, 8), (3, 8.0, 8), (), None],
)
def test_an_image_shape_out_of_range_is_refused(shape: Any) -> None:
    message = r"\(C, H, W\) with C 1 or 3 and H, W from 8 to 224; got"
    with pytest.raises(ConfigError, match=message):
        check_image_shape(shape)
    for kind in REAL:
        with pytest.raises(ConfigError, match=message):
            MEMORIES[kind](shape, **CODECS.get(kind, {}))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 7, 8), 8), ((1, 4, 4), 8), ((3, 8, 225), 224), ((3, 256, 256), 224)]
)
def test_images_too_small_or_too_large_are_to_be_resized(
    shape: tuple[int, int, int], size: int
) -> None:
    wanted = (
        rf"8 to 224 pixels; got {shape[1]} x {shape[2]} .* as_labelled_images\(data, size={size}"
    )
    images = torch.zeros((4, *shape), dtype=torch.uint8)
    data = LabelledImages(images, torch.tensor([0, 1, 0, 1]))
    for kind in REAL:
        with pytest.raises(DataError, match=wanted):
            MEMORIES[kind](shape, **CODECS.get(kind, {}))  # type: ignore[call-arg]
    with pytest.raises(DataError, match=wanted):
        check_image_shape(shape)
    for refuse in (raw_images, condense):
        with pytest.raises(DataError, match=wanted):
            refuse(data, "9 MiB")
    resized = as_labelled_images(data, size=size)
    assert raw_images(resized, "9 MiB").image_shape == (shape[0], size, size)


@pytest.mark.parametrize("kind", ["raw", "hmn"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 2**20, "class names take 1,048,576 bytes in all at most; these take 1,048"),
        (5, "class names are texts that UTF-8 can hold; that of label .* is 5"),
        ("caf\udce9", "class names are texts that UTF-8 can hold"),
    ],
)
def test_names_that_could_not_be_read_again_are_refused(kind: str, name: Any, message: str) -> None:
    memory = any_memory(kind)
    memory.class_names = {int(memory.classes[0]): name}
    with pytest.raises(DataError, match=message):
        memory.to_bytes()
    memory.class_names = {int(memory.classes[0]): "é" * 1000}
    assert loads(memory.to_bytes()).class_names == memory.class_names


def test_names_too_long_to_be_read_again_are_not_affordable() -> None:
    assert affordable_names({0: "x" * 2**20}, [0], 10**9) == {}


def test_a_transform_may_change_what_it_is_given() -> None:
    dataset = any_memory("raw").as_dataset(lambda image: image.sub_(0.5))
    first: Any = dataset[0][0]
    assert first.equal(dataset[0][0])


@every_kind
def test_a_codec_takes_images_of_the_memory_s_shape(kind: str) -> None:
    memory = any_memory(kind)
    if not memory.has_codec:
        assert memory.codec() is None
        return
    codec, images = memory.codec(), memory.decode(dtype=torch.uint8)[0]
    assert codec is not None
    assert codec(images).shape == images.shape and codec(images[:0]).equal(images[:0])
    channels, height, width = memory.image_shape
    others = [
        images.float() / 255,
        images[0],
        torch.zeros((2, channels, 2 * height, 2 * width), dtype=torch.uint8),
        torch.zeros((2, 4 - channels, height, width), dtype=torch.uint8),
    ]
    for wrong in others:
        with pytest.raises(DataError, match="the codec takes uint8 images of"):
            codec(wrong)
    memory.keep([])
    assert memory.codec() is None


@every_kind
def test_a_memory_shrinks_to_a_budget_of_any_form(kind: str) -> None:
    memory = any_memory(kind)
    memory.shrink("1 MiB")
    limit = memory.file_bytes - 1
    memory.shrink(Budget(limit))
    assert memory.file_bytes <= limit
    with pytest.raises(BudgetError, match="a budget is"):
        memory.shrink(-5)

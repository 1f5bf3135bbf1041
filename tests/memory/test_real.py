"""Memories of real images: the same verbs for pixels, JPEG scans and lossless WebP."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, DataError, MemoryFileError
from hmn_replay.memory import (
    MEMORIES,
    JPEGMemory,
    LosslessMemory,
    RawMemory,
    RealMemory,
    SubsampledMemory,
    loads,
)
from hmn_replay.memory.file import Record, pack, unpack
from hmn_replay.memory.jpeg import decode_jpeg_scans, encode_jpeg_scans
from tests.support import CODECS, REAL, real, real_set, same_bits

pytestmark = pytest.mark.usefixtures("untouched_random_state")
every_kind = pytest.mark.parametrize("kind", REAL)
exact = pytest.mark.parametrize("kind", ["raw", "lossless"])


def empty(kind: str, budget: int | None = None, image_shape: Any = (3, 8, 8)) -> RealMemory:
    memory_type: Any = MEMORIES[kind]
    memory: RealMemory = memory_type(image_shape, budget=budget, **CODECS.get(kind, {}))
    return memory


def by_class(memory: RealMemory) -> dict[int, list[bytes]]:
    labels = memory.labels.tolist()
    return {
        label: [p for p, own in zip(memory.payloads, labels, strict=True) if own == label]
        for label in memory.classes.tolist()
    }


# Codecs.


@exact
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 9, 14), (3, 33, 20)])
def test_images_are_the_real_ones_bit_for_bit(kind: str, shape: tuple[int, int, int]) -> None:
    data = real_set(shape, (5, 9), (3, 4))
    memory = empty(kind, image_shape=shape)
    memory.extend(data)
    for one in (memory, loads(memory.to_bytes())):
        images, labels = one.decode(dtype=torch.uint8)
        assert images.equal(data.images)
        assert labels.equal(data.labels)
        assert one.decode()[0].equal(data.images.float() / 255)


@every_kind
def test_images_are_recoded_as_they_would_be_stored(kind: str) -> None:
    data = real_set((3, 8, 8), (5, 9), (3, 4))
    memory = empty(kind)
    memory.extend(data)
    decoded = memory.decode(dtype=torch.uint8)[0]
    assert memory.recode(data.images).equal(decoded)
    codec = memory.codec()
    assert memory.has_codec and codec is not None and codec(data.images).equal(decoded)


@pytest.mark.parametrize("factor", [2, 4])
def test_subsampled_images_are_interpolated_means(factor: int) -> None:
    """Against means and bilinear interpolation pixel by pixel."""
    data = real_set((3, 8, 16), (5, 9), (3, 4))
    memory = SubsampledMemory((3, 8, 16), factor=factor)
    memory.extend(data)
    found = memory.decode(dtype=torch.uint8)[0].numpy()
    assert [len(payload) for payload in memory.payloads] == [3 * 8 * 16 // factor**2] * 7
    images = data.images.double().numpy().reshape(7, 3, 8 // factor, factor, 16 // factor, factor)
    grid = np.rint(images.mean(axis=(3, 5)))

    def between(position: int, length: int) -> tuple[int, int, float]:
        place = min(max((position + 0.5) / factor - 0.5, 0), length - 1)
        low = min(int(place), length - 1)
        return low, min(low + 1, length - 1), place - low

    for y in range(8):
        top, bottom, down = between(y, 8 // factor)
        for x in range(16):
            left, right, along = between(x, 16 // factor)
            rows = [
                grid[:, :, row, left] * (1 - along) + grid[:, :, row, right] * along
                for row in (top, bottom)
            ]
            wanted = rows[0] * (1 - down) + rows[1] * down
            np.testing.assert_array_equal(found[:, :, y, x], np.rint(wanted))


def test_a_factor_is_2_to_8() -> None:
    for factor in (1, 9, 2.5):
        with pytest.raises(ConfigError, match="factor is a whole number from 2 to 8"):
            SubsampledMemory((3, 8, 8), factor=factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:4:4"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14)])
def test_jpeg_images_are_those_of_their_scans(
    shape: tuple[int, int, int], subsampling: str
) -> None:
    data = real_set(shape, (5, 9), (3, 4))
    memory = JPEGMemory(shape, quality=40, subsampling=subsampling)
    memory.extend(data)
    header, scans = encode_jpeg_scans(data.images, 40, subsampling=subsampling)
    assert memory.header() == header
    assert memory.payloads == scans
    loaded = loads(memory.to_bytes())
    assert isinstance(loaded, JPEGMemory)
    assert (loaded.quality, loaded.subsampling) == (40, subsampling)
    for one in (memory, loaded):
        assert one.decode(dtype=torch.uint8)[0].equal(decode_jpeg_scans(header, scans))
    codec = {"quality": 40, "subsampling": subsampling}
    assert codec.items() <= memory.summary().items()


def test_lossless_images_are_webp_less_its_header() -> None:
    data = real_set((3, 12, 20), (0,), (3,))
    memory = LosslessMemory((3, 12, 20))
    memory.extend(data)
    for image, payload in zip(data.images, memory.payloads, strict=True):
        chunk = b"VP8L" + len(payload).to_bytes(4, "little") + payload + b"\0" * (len(payload) % 2)
        file = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
        pixels = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
        assert torch.from_numpy(pixels).movedim(-1, 0).equal(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 0}, "quality is a whole number from 1 to 100; got 0"),
        ({"quality": 40, "subsampling": "4:1:1"}, r"subsampling must be one of .*; got '4:1:1'"),
        ({"quality": 2.5}, "quality is a whole number from 1 to 100; got 2.5"),
    ],
)
def test_options_of_jpeg_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JPEGMemory((3, 8, 8), **options)


@pytest.mark.parametrize("number", [np.int64(4), np.uint8(4), torch.tensor(4)])
def test_settings_may_be_whole_numbers_of_any_library(number: Any) -> None:
    data = real_set()
    for plain, memory in (
        (JPEGMemory((3, 8, 8), quality=4), JPEGMemory((3, 8, 8), quality=number)),
        (SubsampledMemory((3, 8, 8), factor=4), SubsampledMemory((3, 8, 8), factor=number)),
    ):
        plain.extend(data)
        memory.extend(data)
        assert memory.to_bytes() == plain.to_bytes()
    assert encode_jpeg_scans(data.images, number) == encode_jpeg_scans(data.images, 4)


def test_long_scans_have_their_lengths_in_two_bytes() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (6, 3, 32, 32), np.uint8))
    data = LabelledImages(noise, torch.arange(6))
    for quality, dtype in ((90, torch.int16), (1, torch.uint8)):
        memory = JPEGMemory((3, 32, 32), quality=quality)
        memory.extend(data)
        assert memory.stored()["lengths"].dtype == dtype
        assert same_bits(loads(memory.to_bytes()).decode()[0], memory.decode()[0])


@every_kind
def test_bits_are_those_of_what_is_stored(kind: str) -> None:
    memory = real(kind)
    assert memory.bits() == {
        name: 8.0 * tensor.numel() * tensor.element_size()
        for name, tensor in memory.stored().items()
    }


# A budget, and who makes room.


@every_kind
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_file_fills_its_budget_and_not_one_more_image_fits(
    kind: str, data: st.DataObject
) -> None:
    counts = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    images = real_set((3, 8, 8), range(len(counts)), counts, seed=data.draw(st.integers(0, 9)))
    whole = empty(kind)
    whole.extend(images)
    budget = data.draw(st.integers(whole.file_bytes // 3, whole.file_bytes + 20))
    memory = empty(kind, budget)
    try:
        memory.extend(images)
    except BudgetError:
        assert memory.num_images == 0
        return
    assert len(memory.to_bytes()) == memory.file_bytes <= budget
    # The first image of every class, then the second: a prefix of them, and the longest.
    queue = sorted((i, label) for label, count in enumerate(counts) for i in range(count))
    kept = sorted((label, i) for i, label in queue[: len(memory)])
    payloads = by_class(whole)
    assert memory.payloads == [payloads[label][i] for label, i in kept]
    assert memory.labels.tolist() == [label for label, _ in kept]
    if len(memory) < len(whole):
        more = empty(kind, 10**6 + budget)
        more.extend(images)
        starts = np.cumsum([0, *counts])
        one_more = [int(starts[label] + i) for i, label in queue[: len(memory) + 1]]
        more.keep(one_more)
        gone = [label for label in more.classes.tolist() if not more.images_per_class[label]]
        if gone:
            more.remove(gone)
        more.budget_bytes = budget
        assert more.file_bytes > budget


@every_kind
def test_every_class_has_its_share_where_images_stand_class_by_class(kind: str) -> None:
    """300 images of each class, of which the budget holds some thirty in all."""
    data = real_set((3, 8, 8), (0, 1, 2), (300, 300, 300))
    whole = real(kind, classes=(0, 1, 2), counts=(10, 10, 10))
    memory = empty(kind, whole.file_bytes)
    memory.extend(data)
    counts = memory.images_per_class
    assert memory.classes.tolist() == [0, 1, 2]
    assert counts == sorted(counts, reverse=True)
    assert 5 <= min(counts) <= max(counts) <= min(counts) + 1


@every_kind
def test_old_classes_make_room_for_new_ones_and_keep_every_byte(kind: str) -> None:
    whole = real(kind, counts=(20, 20))
    memory = real(kind, counts=(20, 20), budget=whole.file_bytes + 30)
    before = by_class(memory)
    assert sum(map(len, before.values())) == 40
    memory.extend(real_set(classes=(1, 2), counts=(20, 20), seed=1))
    assert memory.classes.tolist() == [-3, 1, 2, 7]
    counts = memory.images_per_class
    assert 8 <= min(counts) <= max(counts) <= min(counts) + 1
    assert len(memory.to_bytes()) == memory.file_bytes <= whole.file_bytes + 30
    after = by_class(memory)
    for label, payloads in before.items():
        assert after[label] == payloads[: len(after[label])]


@every_kind
def test_new_and_old_images_of_a_class_that_is_added_again_take_turns(kind: str) -> None:
    memory = real(kind)
    old = by_class(memory)
    again = real_set(classes=(7, 9), counts=(4, 1), seed=5)
    fresh = empty(kind)
    fresh.extend(again)
    new = by_class(fresh)
    assert len(old[7]) == 3
    memory.extend(again)
    turns = [new[7][0], old[7][0], new[7][1], old[7][1], new[7][2], old[7][2], new[7][3]]
    assert by_class(memory) == {-3: old[-3], 7: turns, 9: new[9]}
    memory.extend(again)
    assert by_class(memory) == {-3: old[-3], 7: turns, 9: new[9]}, "it has them to the byte"


def test_as_many_new_as_old_images_of_a_class_stay_within_a_budget() -> None:
    first, second = (real_set(classes=(0, 1), counts=(40, 40), seed=seed) for seed in (1, 2))
    memory = empty("raw", 9_000)
    memory.extend(first)
    before = {payload for own in by_class(memory).values() for payload in own}
    memory.extend(second)
    assert memory.file_bytes <= 9_000 and len(memory) >= len(before) - 1
    for own in by_class(memory).values():
        num_old = sum(payload in before for payload in own)
        assert abs(num_old - (len(own) - num_old)) <= 1


def test_images_that_are_there_take_no_room_of_new_ones() -> None:
    first, second = (real_set(classes=(0,), counts=(300,), seed=seed) for seed in (1, 2))
    memory = empty("raw", 60_000)
    memory.extend(first)
    before = set(memory.payloads)
    images = torch.cat([first.images, second.images])
    memory.extend(LabelledImages(images, torch.cat([first.labels, second.labels])))
    num_old = sum(payload in before for payload in memory.payloads)
    assert abs(2 * num_old - len(memory)) <= 1


def test_a_label_has_one_name() -> None:
    memory = real("raw", classes=(0, 1), counts=(2, 2))
    memory.class_names = {0: "cat"}
    before = memory.to_bytes()
    data = real_set(classes=(0, 2), counts=(2, 2), seed=3)
    named = LabelledImages(data.images, data.labels, {0: "dog", 2: "owl"})
    with pytest.raises(DataError, match="label 0 is 'cat' in the memory and 'dog' in the images"):
        memory.extend(named)
    assert memory.to_bytes() == before
    memory.extend(LabelledImages(data.images, data.labels, {2: "owl"}))
    assert memory.class_names == {0: "cat", 2: "owl"}


@pytest.mark.parametrize("order", [[3, 0], np.array([3, 0])])
def test_an_order_may_be_a_list_or_an_array(order: Any) -> None:
    memory, other = empty("raw"), empty("raw")
    memory.extend(real_set(), order=order)
    other.extend(real_set(), order=torch.tensor([3, 0]))
    assert memory.to_bytes() == other.to_bytes()


@every_kind
def test_images_of_a_class_are_taken_in_the_order_given(kind: str) -> None:
    data = real_set(classes=(0, 1), counts=(4, 4))
    whole = empty(kind)
    whole.extend(data)
    own = by_class(whole)
    memory = empty(kind)
    memory.extend(data, order=torch.tensor([6, 3, 1, 4, 0]))
    assert by_class(memory) == {0: [own[0][i] for i in (3, 1, 0)], 1: [own[1][i] for i in (2, 0)]}
    fewer = empty(kind, memory.file_bytes - 1 - (kind == "raw"))
    fewer.extend(data, order=torch.tensor([6, 3, 1, 4, 0]))
    assert by_class(fewer)[0] == [own[0][i] for i in (3, 1)]


@every_kind
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0.0, 1.0]), r"an order is int64 positions \(n,\) in \[0, 5\), one or more"),
        (torch.tensor([[0, 1]]), "an order is int64 positions"),
        (torch.tensor([], dtype=torch.int64), "an order is int64 positions"),
        (torch.tensor([0, 5]), "an order is int64 positions"),
        (torch.tensor([-1, 0]), "an order is int64 positions"),
        ("first", "an order is int64 positions"),
        ([0.5, 1.0], "an order is int64 positions"),
        (torch.tensor([3, 0, 3]), "an order has each position once at most"),
    ],
)
def test_an_order_that_is_none_is_refused(kind: str, order: Any, message: str) -> None:
    memory = real(kind)
    before = memory.to_bytes()
    with pytest.raises(ConfigError, match=message):
        memory.extend(real_set(), order=order)
    assert memory.to_bytes() == before


@every_kind
def test_a_budget_too_small_names_the_smallest_that_does(kind: str) -> None:
    data = real_set()
    with pytest.raises(BudgetError, match="does not hold one image; the smallest that") as caught:
        empty(kind, 100).extend(data)
    smallest = int(str(caught.value).rpartition("is ")[2].removesuffix(" bytes").replace(",", ""))
    memory = empty(kind, smallest)
    memory.extend(data)
    assert len(memory) == 1
    with pytest.raises(BudgetError):
        empty(kind, smallest - 1).extend(data)


@every_kind
def test_extend_that_fails_changes_nothing(kind: str) -> None:
    memory = real(kind)
    memory.class_names = {7: "cat"}
    before = memory.to_bytes()
    memory.budget_bytes = 50
    with pytest.raises(BudgetError):
        memory.extend(real_set(classes=(1,), counts=(2,)))
    with pytest.raises(DataError, match=r"expected images of \(3, 8, 8\), as the memory has; got"):
        memory.extend(real_set((3, 9, 9)))
    memory.budget_bytes = None
    assert memory.to_bytes() == before


@every_kind
def test_more_classes_than_a_file_may_have_are_refused(kind: str) -> None:
    memory = empty(kind)
    data = LabelledImages(
        torch.zeros(600, *memory.image_shape, dtype=torch.uint8), torch.arange(600)
    )
    memory.extend(data)
    before = memory.to_bytes()
    with pytest.raises(ConfigError, match="a memory has 1 to 1000 classes; got 1100"):
        memory.extend(LabelledImages(data.images, data.labels + 500))
    assert memory.to_bytes() == before


@every_kind
def test_a_memory_before_its_first_images_has_a_size_and_no_file(kind: str, tmp_path: Path) -> None:
    memory = empty(kind)
    assert memory.file_bytes > 0 and memory.num_classes == 0
    for save in (memory.to_bytes, lambda: memory.save(tmp_path / "memory.hmn")):
        with pytest.raises(DataError, match=r"no class; extend\(\) it with images first"):
            save()
    assert not list(tmp_path.iterdir())


@every_kind
def test_names_of_classes_are_taken_over_where_they_are_affordable(kind: str) -> None:
    data = real_set(classes=(0, 1), counts=(30, 30))
    data = LabelledImages(data.images, data.labels, {0: "cat", 1: "dog"})
    memory = empty(kind, 10**6)
    memory.extend(data)
    memory.extend(real_set(classes=(5,), counts=(1,)))
    assert loads(memory.to_bytes()).class_names == {0: "cat", 1: "dog"}
    tight = empty(kind, 1200)
    tight.extend(data)
    assert tight.class_names == {}
    assert tight.file_bytes <= 1200


@every_kind
def test_room_for_one_image_of_each_class_is_counted_without_a_change(kind: str) -> None:
    memory = real(kind, classes=(0, 1), counts=(3, 4), budget=9000)
    before, more = memory.to_bytes(), real_set(classes=(1, 2), counts=(1, 1), seed=3)
    counted = memory.bytes_of_one_each(3, 9000, more)
    assert memory.to_bytes() == before
    own = memory.bytes_of_one_each(2, 9000)
    memory.extend(more)
    for wanted, classes in ((counted, (0, 1, 2)), (own, None)):
        kept = loads(memory.to_bytes() if classes else before)
        starts = [sum(kept.images_per_class[:i]) for i in range(kept.num_classes)]
        kept.keep(starts)
        assert kept.file_bytes == wanted


@every_kind
def test_a_loaded_memory_goes_on_like_the_one_saved(kind: str) -> None:
    memory = real(kind, counts=(4, 5), budget=4000)
    loaded = loads(memory.to_bytes())
    assert isinstance(loaded, RealMemory)
    for one in (memory, loaded):
        one.keep([0, 1, 4, 8])
        one.extend(real_set(classes=(1,), counts=(3,), seed=3))
    assert memory.to_bytes() == loaded.to_bytes()
    assert memory.images_per_class == [2, 3, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_images_are_decoded_to_a_gpu(kind: str) -> None:
    memory = real(kind)
    images, _ = memory.decode()
    moved, own_labels = memory.to("cuda").decode()
    assert moved.device.type == own_labels.device.type == "cuda"
    # A GPU divides by 255 with another last bit.
    torch.testing.assert_close(moved.cpu(), images, rtol=0, atol=1e-6)
    memory.keep([0, 3])
    memory.extend(real_set(classes=(1,), counts=(2,)))
    torch.testing.assert_close(memory.decode()[0][:1].cpu(), images[:1], rtol=0, atol=1e-6)


# Files that were forged: the digest fits.


def forged(memory: RealMemory, words: Any = None, **tensors: Tensor | None) -> bytes:
    """Return a file with other words or tensors, as someone with bad intent would write it."""
    stored = {**memory.stored(), **tensors}
    given = {name: tensor for name, tensor in stored.items() if tensor is not None}
    wanted = memory.words() if words is None else words
    record = Record(memory.kind, len(memory), None, wanted, {**labels_of(memory), **given})
    return pack(record)


def labels_of(memory: RealMemory) -> dict[str, Tensor]:
    written = unpack(memory.to_bytes()).tensors
    return {name: written[name] for name in ("labels", "counts")}


def uint8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "words", "tensors", "message"),
    [
        ("raw", None, {"images": torch.zeros(959, dtype=torch.uint8)}, "tensor 'images' is torch"),
        ("raw", None, {"images": torch.zeros(960, dtype=torch.int8)}, "tensor 'images' is torch"),
        ("raw", None, {"images": None}, r"not those of such a memory: \['images'\]"),
        ("raw", None, {"lengths": uint8(1)}, r"not those of such a memory: \['lengths'\]"),
        ("raw", ("3,8,9",), {}, "tensor 'images' is torch.uint8"),
        ("raw", ("2,8,8",), {}, r"\(C, H, W\) with C 1 or 3"),
        ("raw", ("3,8,8", "x"), {}, "too many values"),
        ("raw", ("3,08,8",), {}, "written in another way"),
        ("raw", ("3,8,x",), {}, "invalid literal"),
        ("jpeg", None, {"lengths": uint8(1, 1, 1, 1)}, "images and their lengths do not fit"),
        ("jpeg", None, {"lengths": uint8(1, 1, 1, 1, 0)}, "images and their lengths do not fit"),
        ("jpeg", None, {"lengths": uint8(1, 1, 1, 1, 9)}, "tensor 'images' is torch.uint8"),
        ("jpeg", None, {"lengths": None}, "images and their lengths do not fit"),
        ("jpeg", None, {"header": None}, "'header'"),
        ("jpeg", None, {"header": uint8(1, 2, 3)}, "not a JPEG header"),
        ("jpeg", ("3,8,16", "30", "4:2:0"), {}, "JPEG header is that of images of another shape"),
        ("jpeg", ("3,8,8", "0", "4:2:0"), {}, "quality is a whole number"),
        ("jpeg", ("3,8,8", "30", "4:1:1"), {}, "subsampling must be one of"),
        ("jpeg", ("3,8,8", "30"), {}, "not enough values"),
        ("lossless", None, {"lengths": None}, "images and their lengths do not fit"),
        ("lossless", ("3,8,8", "30"), {}, "too many values"),
        ("subsampled", ("3,8,8", "9"), {}, "factor is a whole number"),
        ("subsampled", ("3,8,8", "02"), {}, "written in another way"),
        ("subsampled", ("3,8,8", "4"), {}, "tensor 'images' is"),
    ],
)
def test_a_forged_file_is_refused_with_the_reason(
    kind: str, words: Any, tensors: dict[str, Any], message: str
) -> None:
    data = forged(real(kind), words, **tensors)
    with pytest.raises(MemoryFileError, match=message):
        loads(data)


@pytest.mark.parametrize("kind", ["jpeg", "lossless"])
def test_an_image_that_cannot_be_decoded_is_refused_when_it_is_asked_for(kind: str) -> None:
    memory = real(kind)
    length = len(memory.payloads[0])
    images = memory.stored()["images"].clone()
    images[:length] = 255 if kind == "lossless" else 0
    loaded = loads(forged(memory, images=images))
    assert same_bits(loaded.decode([1, 2])[0], real(kind).decode([1, 2])[0])
    if kind == "lossless":
        with pytest.raises(DataError, match="lossless image 0 cannot be decoded"):
            loaded.decode([0])


def test_a_lossless_image_of_another_size_is_refused() -> None:
    memory = real("lossless")
    memory.payloads = real("lossless", (3, 9, 9)).payloads
    with pytest.raises(DataError, match="lossless image 0 cannot be decoded"):
        loads(memory.to_bytes()).decode()


def test_a_raw_memory_is_as_large_as_its_pixels() -> None:
    memory = RawMemory((3, 32, 32))
    memory.extend(real_set((3, 32, 32), range(10), [5] * 10))
    assert 0 < memory.file_bytes - 50 * 3072 < 400

"""Soft labels and a labeller in a file: what they keep, what they cost, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn_replay import HierarchicalMemory, ReplayMemory, raw_images
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import BudgetError, ConfigError, MemoryFileError
from hmn_replay.memory import LearnedMemory, Memory, RealMemory, SubsampledMemory, load, loads
from hmn_replay.memory.file import Record, pack, unpack
from hmn_replay.memory.labels import LabelBytes, Labeller, SoftLabels, expected_bytes
from hmn_replay.training.networks import Network, build_network
from tests.support import KINDS, any_memory, made, real, real_set, same_bits

LABEL_TENSORS = {"label_code", "labeller_code", "labeller_values"}

every_kind = pytest.mark.parametrize("kind", KINDS)


def probabilities(num_images: int, num_classes: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(num_images, num_classes, generator=generator)).softmax(dim=1)


def labelled(kind: str, seed: int = 0, **options: Any) -> Memory:
    memory = any_memory(kind, **options)
    memory.set_soft_labels(probabilities(memory.num_images, memory.num_classes, seed))
    return memory


def network(width: int = 5, num_classes: int = 2, seed: int = 0) -> Network:
    built = build_network("convnet", (3, 8, 8), num_classes, width=width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return built.eval()


def altered(memory: Memory, **tensors: Tensor | None) -> bytes:
    """Return the file of a memory with other tensors, whose digest fits."""
    record = unpack(memory.to_bytes())
    both = {**record.tensors, **tensors}
    kept = {name: tensor for name, tensor in both.items() if tensor is not None}
    return pack(Record(record.kind, record.num_images, record.budget_bytes, record.words, kept))


@every_kind
def test_labels_are_saved_counted_and_loaded(kind: str, tmp_path: Path) -> None:
    memory = any_memory(kind, budget=50_000)
    plain_bytes, images = memory.file_bytes, memory.decode()[0]
    assert not memory.has_soft_labels
    assert memory.richest_labels == "hard"
    assert memory.soft_labels().equal(F.one_hot(memory.class_index, 2).float())
    wanted = probabilities(memory.num_images, 2)
    memory.set_soft_labels(wanted)
    assert memory.richest_labels == memory.summary()["labels"] == "soft"
    assert memory.decode()[0].equal(images)
    assert len(memory.to_bytes()) == memory.file_bytes > plain_bytes
    # Every level is half a step from what it stands for, at most; what is next to nothing is 0.
    kept = memory.soft_labels()
    is_named = (kept > 0).all(dim=1)
    assert bool(is_named.any())
    ratios = ((kept[:, 0] / kept[:, 1]).log() - (wanted[:, 0] / wanted[:, 1]).log())[is_named]
    assert float(ratios.abs().max()) < 0.375 + 1e-3
    assert float(wanted[~is_named].min(dim=1).values.sum()) < 0.004 * len(wanted)
    memory.save(tmp_path / "memory.hmn")
    loaded = load(tmp_path / "memory.hmn")
    assert loaded.soft_labels().equal(kept)
    assert loaded.to_bytes() == memory.to_bytes()
    assert memory.bits()["soft_labels"] == 8 * memory.summary()["label_bytes"] > 0
    with pytest.raises(ConfigError, match="each index may occur once"):
        memory.set_soft_labels(wanted[:2], [0, 0])
    memory.set_soft_labels(None)
    assert memory.file_bytes == plain_bytes
    assert not LABEL_TENSORS & set(unpack(memory.to_bytes()).tensors)


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    seed=st.integers(0, 99),
    spread=st.floats(0.1, 20),
)
@settings(max_examples=60, deadline=None)
def test_labels_are_read_as_they_were_written(counts: list[int], seed: int, spread: float) -> None:
    labels = SoftLabels.hard(counts)
    num_images = sum(counts)
    chosen = torch.arange(0, num_images, 2)
    wanted = probabilities(len(chosen), len(counts), seed, spread)
    labels = labels.replaced(chosen, wanted)
    again = SoftLabels.restored(labels.stored(), counts, 10_000)
    assert again is not None
    assert again.levels.equal(labels.levels)
    rows = labels.probabilities()
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(num_images))
    assert bool((rows >= 0).all())


def test_the_most_likely_classes_are_named_and_others_are_not() -> None:
    wanted = torch.tensor([[0.3, 0.2, 0.15, 0.1, 0.08, *[0.0085] * 20]])
    kept = SoftLabels.hard([1, *[0] * 24]).replaced(torch.tensor([0]), wanted).probabilities()
    assert kept[0, :5].argsort(descending=True).tolist() == [0, 1, 2, 3, 4]
    assert not kept[0, 5:].any()
    ratios = kept[0, :5].log() - wanted[0, :5].log()
    assert float(ratios.max() - ratios.min()) < 0.75
    # Of few classes, all are named.
    few = wanted[:, :15] / wanted[:, :15].sum()
    labels = SoftLabels.hard([1, *[0] * 14]).replaced(torch.tensor([0]), few)
    assert bool((labels.levels > 0).all())


def test_alike_labels_of_a_class_take_fewer_bytes() -> None:
    """The class's prior is learned from its images: a byte or two are left for each."""
    num_classes, each = 10, 60
    priors = probabilities(num_classes, num_classes, spread=2.0).repeat_interleave(each, 0)
    noise = probabilities(num_classes * each, num_classes, seed=1, spread=0.3)
    alike = (priors.log() + noise.log()).softmax(dim=1)
    positions = torch.arange(len(alike))
    sizes = []
    for rows in (alike, alike[torch.randperm(len(alike), generator=torch.manual_seed(0))]):
        labels = SoftLabels.hard([each] * num_classes).replaced(positions, rows)
        sizes.append(len(labels.code) / len(positions))
    assert sizes[0] < 0.8 * sizes[1]
    assert 0.5 * expected_bytes(num_classes) < sizes[1] < 1.5 * expected_bytes(num_classes)


@pytest.mark.parametrize(("num_classes", "each"), [(17, 8), (100, 1), (100, 20), (400, 2)])
def test_labels_of_many_classes_take_few_bytes(num_classes: int, each: int) -> None:
    """No model has to learn first that most classes of most images have level 0."""
    priors = probabilities(num_classes, num_classes, spread=1.5).repeat_interleave(each, 0)
    noise = probabilities(num_classes * each, num_classes, seed=1)
    own = 5.0 * torch.eye(num_classes).repeat_interleave(each, 0)
    rows = (priors.log() + noise.log() + own).softmax(dim=1)
    labels = SoftLabels.hard([each] * num_classes).replaced(torch.arange(len(rows)), rows)
    assert 0.5 < len(labels.code) / len(rows) / expected_bytes(num_classes) < 1.4


@pytest.mark.parametrize("kind", ["raw", "hmn"])
def test_rows_that_are_no_probabilities_are_refused(kind: str) -> None:
    memory = any_memory(kind)
    rows: Any = probabilities(memory.num_images, 2).numpy()
    memory.set_soft_labels(rows)
    before = memory.to_bytes()
    for value in (0.0, -0.1, float("nan"), float("inf")):
        rows = probabilities(memory.num_images, 2)
        rows[1] = value
        with pytest.raises(ConfigError, match="finite probabilities, of each image not all 0"):
            memory.set_soft_labels(rows)
    assert memory.to_bytes() == before


@pytest.mark.parametrize("kind", ["features", "raw-features"])
def test_features_have_no_labels_of_augmented_images(kind: str) -> None:
    data = torch.arange(160.0).view(20, 8, 1, 1), torch.arange(20) % 2
    options: dict[str, Any] = {"warm_start_steps": 1} if kind == "features" else {}
    memory = ReplayMemory("3 KiB", kind, **options)
    memory.update(data)
    assert memory.memory is not None
    with pytest.raises(ConfigError, match="leave them out for features"):
        memory.memory.set_soft_labels(torch.ones(len(memory.memory), 2))
    with pytest.raises(ConfigError, match="leave them out for features"):
        memory.memory.set_labeller(Labeller.of(network(), (3, 8, 8)))
    code = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(MemoryFileError, match="a memory of features has labels of images"):
        loads(altered(memory.memory, label_code=code))


def test_a_labeller_takes_its_bytes_when_classes_come_again() -> None:
    draws = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (200, 3, 8, 8), generator=draws, dtype=torch.uint8)
    labels = torch.arange(200) % 2
    memory = raw_images(LabelledImages(images[:100], labels[:100]), 16_000)
    memory.set_labeller(Labeller.of(network(16), (3, 8, 8)))
    memory.shrink()
    memory.extend(LabelledImages(images[100:], labels[100:]))
    assert memory.richest_labels == "labeller"
    assert 16_000 - 2 * 192 < memory.file_bytes == len(memory.to_bytes()) <= 16_000


def test_a_labeller_leaves_the_decoder_as_it_is() -> None:
    """What is planned for it is taken off the images, not off what they share."""
    plain, with_labeller = (
        HierarchicalMemory.choose_layout("30 KiB", (3, 32, 32), 10, label_bytes=LabelBytes(size))
        for size in (0, 3_712)
    )
    assert with_labeller.decoder_channels == plain.decoder_channels
    assert with_labeller.dataset_channels == plain.dataset_channels


@every_kind
def test_an_image_keeps_its_label_while_others_go_and_come(kind: str) -> None:
    memory = labelled(kind)
    size, before = memory.images_kept_together, memory.soft_labels()
    kept = [*range(size), *range(2 * size, 4 * size)]
    memory.keep(kept)
    assert memory.soft_labels().equal(before[kept])
    before = memory.soft_labels()
    if isinstance(memory, LearnedMemory):
        memory.add_classes([100], size)
        new = torch.arange(len(memory)) >= len(kept)
    else:
        assert isinstance(memory, RealMemory)
        # A label between the others: real images stand by ascending labels.
        memory.extend(real_set(classes=[0], counts=[2], seed=9))
        new = memory.labels == 0
    after, column = memory.soft_labels(), int(memory.class_index[new][0])
    old = [position for position in range(3) if position != column]
    assert after[~new][:, old].equal(before)
    assert not after[~new][:, column].any(), "a class that they did not know"
    assert after[new].equal(F.one_hot(memory.class_index[new], 3).float())
    assert loads(memory.to_bytes()).soft_labels().equal(after)
    memory.set_soft_labels(torch.full((int(new.sum()), 3), 1 / 3), new.nonzero().flatten())
    torch.testing.assert_close(memory.soft_labels()[new], torch.full((int(new.sum()), 3), 1 / 3))
    assert memory.soft_labels()[~new].equal(after[~new])
    assert loads(memory.to_bytes()).soft_labels().equal(memory.soft_labels())
    memory.remove([7])
    assert memory.soft_labels().shape == (len(memory), 2)
    torch.testing.assert_close(memory.soft_labels().sum(dim=1), torch.ones(len(memory)))


def test_old_images_of_a_class_that_comes_again_keep_their_soft_labels() -> None:
    memory = real("raw", counts=(2, 3))
    memory.set_soft_labels(probabilities(5, 2))
    before = memory.soft_labels()
    memory.extend(real_set(classes=[7], counts=[2], seed=4))
    assert memory.images_per_class == [2, 5]
    after = memory.soft_labels()
    assert after[[0, 1, 3, 5, 6]].equal(before)
    assert after[[2, 4]].equal(torch.tensor([[0.0, 1.0]] * 2)), "new images have hard labels"
    assert loads(memory.to_bytes()).soft_labels().equal(after)


def test_labels_count_when_real_images_fill_a_budget() -> None:
    data = real_set(classes=range(10), counts=[40] * 10)
    memory = real("jpeg", classes=range(10), counts=[40] * 10, budget=9_000)
    memory.set_soft_labels(probabilities(len(memory), 10))
    more = len(memory)
    assert memory.file_bytes > 9_000
    with pytest.raises(BudgetError, match="over its budget of 9,000"):
        memory.save("/nowhere/memory.hmn")
    labels, images = memory.soft_labels(), memory.decode()[0]
    counts = memory.images_per_class
    memory.shrink()
    assert 0.97 * 9_000 < memory.file_bytes <= 9_000
    assert 0.7 * more < len(memory) < more
    starts = [sum(counts[:c]) for c in range(10)]
    places = zip(starts, memory.images_per_class, strict=True)
    kept = torch.cat([torch.arange(start, start + count) for start, count in places])
    assert memory.soft_labels().equal(labels[kept])
    assert memory.decode()[0].equal(images[kept])
    assert max(memory.images_per_class) - min(memory.images_per_class) <= 1
    memory.extend(data)
    assert memory.file_bytes <= 9_000
    with pytest.raises(BudgetError, match="does not hold one image"):
        memory.shrink(200)


def test_soft_labels_are_targets_of_a_data_set() -> None:
    memory = labelled("raw")
    dataset = memory.as_dataset(soft=True)
    images, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    assert torch.stack(targets).equal(memory.soft_labels())
    assert torch.stack(images).equal(memory.decode()[0])
    assert dataset.targets == memory.labels.tolist()
    assert memory.as_dataset()[0][1] == -3
    assert memory.soft_labels([3, 0]).equal(memory.soft_labels()[[3, 0]])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (torch.ones(4, 2), r"probabilities \(5, 2\), one a class of each image; got \(4, 2\)"),
        (torch.ones(5, 3), r"got \(5, 3\)"),
        (torch.full((5, 2), -1.5), "finite probabilities.* from -1.5 to -1.5: logits.*softmax"),
        (torch.full((5, 2), torch.nan), "from nan to nan"),
        (torch.zeros(5, 2), "of each image not all 0; got values from 0 to 0"),
    ],
)
def test_what_are_no_probabilities_is_refused(wanted: Tensor, message: str) -> None:
    memory = real("raw")
    with pytest.raises(ConfigError, match=message):
        memory.set_soft_labels(wanted)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"label_code": torch.zeros(3, dtype=torch.uint8)}, "3 bytes, not a multiple of 4"),
        ({"label_code": torch.zeros(4)}, "is not a row of bytes"),
        ({"label_code": torch.full((4000,), 255, dtype=torch.uint8)}, "labels"),
    ],
)
def test_a_file_with_labels_that_are_none_is_refused(
    tensors: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(MemoryFileError, match=message):
        loads(altered(labelled("raw"), **tensors))


def test_labels_that_could_not_be_read_again_are_not_saved(tmp_path: Path) -> None:
    memory = SubsampledMemory((1, 8, 8), factor=8)
    images = torch.zeros(8000, 1, 8, 8, dtype=torch.uint8) + torch.arange(250).repeat(32).view(
        -1, 1, 1, 1
    ).to(torch.uint8)
    memory.extend((images, torch.arange(8000) % 1000))
    memory.set_soft_labels(torch.eye(1000)[:1], [0])
    with pytest.raises(ConfigError, match=r"labels could not be read again: .*or hard labels"):
        memory.save(tmp_path / "memory.hmn")
    assert not list(tmp_path.iterdir())


def test_more_labels_than_the_format_lets_a_file_have_are_refused() -> None:
    """A million images of eight pixels' bytes each would claim a thousand labels each."""
    counts = [3_000, *[0] * 999]
    with pytest.raises(MemoryFileError, match=r"bytes are too few for 3,000,000 values"):
        SoftLabels.restored({"label_code": torch.zeros(8, dtype=torch.uint8)}, counts, 2_000)


# A labeller.


@every_kind
def test_a_labeller_is_saved_counted_and_loaded(kind: str) -> None:
    memory, trained = any_memory(kind), network()
    assert memory.labeller is None
    memory.set_labeller(Labeller.of(trained, (3, 8, 8)))
    assert memory.richest_labels == "labeller"
    data = memory.to_bytes()
    assert len(data) == memory.file_bytes
    again = loads(data)
    assert memory.labeller is not None
    assert again.labeller is not None
    images = torch.rand(6, 3, 8, 8)
    assert same_bits(again.labeller(images), memory.labeller(images))
    assert again.to_bytes() == data
    assert memory.bits()["labeller"] == 8 * memory.summary()["label_bytes"]
    # A state of a learned memory is that of its images.
    if isinstance(memory, LearnedMemory):
        assert not any("labeller" in name for name in memory.state_dict())


def test_a_labeller_answers_as_the_network_does_but_for_rounding() -> None:
    trained = network(width=16, num_classes=4)
    labeller = Labeller.of(trained, (3, 8, 8))
    images = torch.rand(200, 3, 8, 8)
    with torch.no_grad():
        wanted, found = trained(images), labeller(images)
    error = (found - wanted).square().mean() / wanted.square().mean()
    assert 0 < float(error) < 0.05
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) > 0.85
    weights = sum(p.numel() for name, p in trained.named_parameters() if p.ndim > 1)
    stored = sum(t.numel() * t.element_size() for t in labeller.stored().values())
    assert stored < 0.7 * weights


def test_a_labeller_follows_the_classes() -> None:
    memory = made("hmn", classes=(7, -3, 5), groups=(1, 1, 1))
    memory.set_labeller(Labeller.of(network(num_classes=3), (3, 8, 8)))
    assert memory.labeller is not None
    images = torch.rand(4, 3, 8, 8)
    before = memory.labeller(images)
    memory.keep([0, 2])
    assert memory.labeller is not None
    assert memory.labeller(images).equal(before)
    memory.remove([-3])
    assert memory.labeller is not None
    torch.testing.assert_close(memory.labeller(images), before[:, [0, 2]])
    assert loads(memory.to_bytes()).labeller is not None
    memory.add_classes([9], 1)
    assert memory.labeller is None, "it does not know the new class"


def test_only_a_labeller_of_the_memory_s_classes_is_kept() -> None:
    memory = real("raw")
    with pytest.raises(ConfigError, match=r"is for 3 classes .*, the memory has 2"):
        memory.set_labeller(Labeller.of(network(num_classes=3), (3, 8, 8)))
    large = build_network("convnet", (3, 16, 16), 2, width=3, depth=2)
    with pytest.raises(ConfigError, match=r"2 classes of images \(3, 16, 16\), the memory"):
        memory.set_labeller(Labeller.of(large, (3, 16, 16)))
    with pytest.raises(ConfigError, match=r"for images of another shape than \(3, 8, 8\)"):
        Labeller.of(large, (3, 8, 8))
    with torch.no_grad():
        large.get_parameter("body.head.1.bias").fill_(1e6)
    with pytest.raises(ConfigError, match="values are float16, finite; the network's are beyond"):
        Labeller.of(large, (3, 16, 16))
    flat = build_network("convnet", (3, 8, 8), 2, width=3, std=[1e-9] * 3)
    with pytest.raises(ConfigError, match="divides by its standard deviations, in float16; one"):
        Labeller.of(flat, (3, 8, 8))
    with pytest.raises(ConfigError, match="a labeller is a ConvNet; got Linear"):
        Labeller.of(torch.nn.Linear(2, 2), (3, 8, 8))
    with pytest.raises(ConfigError, match="1 to 512 channels and 1 to 8 blocks"):
        Labeller((3, 8, 8), 2, 4, 4)


def values_with(memory: Memory, changes: dict[int, float]) -> Tensor:
    values = unpack(memory.to_bytes()).tensors["labeller_values"].clone()
    for position, value in changes.items():
        values[position] = value
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: 0.0}, "blocks of"),
        ({0: 3.0}, "expected"),
        ({0: 1.5}, "no whole number"),
        ({1: 60_000.0}, "blocks of 60000 channels"),
        ({2: 99.0}, "entropy model of its labeller is out of range"),
        ({2: -1.0}, "entropy model of its labeller is out of range"),
        ({3: float("nan")}, "not finite"),
        ({11: 0.0}, "not positive"),
    ],
)
def test_a_file_with_a_labeller_that_is_none_is_refused(
    changes: dict[int, float], message: str
) -> None:
    memory = real("raw")
    memory.set_labeller(Labeller.of(network(), (3, 8, 8)))
    values = values_with(memory, changes)
    with pytest.raises(MemoryFileError, match=message):
        loads(altered(memory, labeller_values=values))


@pytest.mark.parametrize("name", ["labeller_values", "labeller_code"])
def test_half_a_labeller_is_refused(name: str) -> None:
    memory = real("raw")
    memory.set_labeller(Labeller.of(network(), (3, 8, 8)))
    with pytest.raises(MemoryFileError, match="not a code and its values"):
        loads(altered(memory, **{name: None}))
    code = unpack(memory.to_bytes()).tensors["labeller_code"]
    with pytest.raises(MemoryFileError):
        loads(altered(memory, labeller_code=code[: len(code) // 8 * 4]))


def test_counts_of_a_class_that_has_no_image_take_no_label(indices: Sequence[int] = (0, 1)) -> None:
    memory = labelled("hmn", groups=(2, 3))
    memory.keep(indices)
    assert memory.images_per_class == [2, 0]
    assert loads(memory.to_bytes()).soft_labels().equal(memory.soft_labels())


def test_labels_are_no_part_of_a_state() -> None:
    memory = made("hmn")
    memory.set_soft_labels(probabilities(memory.num_images, memory.num_classes))
    memory.set_labeller(Labeller.of(network(), (3, 8, 8)))
    other = made("hmn", groups=tuple(reversed(memory.images_per_class)))
    memory.load_state_dict(other.state_dict())
    assert memory.images_per_class == other.images_per_class
    assert not memory.has_soft_labels and memory.labeller is None
    assert memory.to_bytes() == other.to_bytes()

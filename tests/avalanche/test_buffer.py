"""A memory as a storage policy of Avalanche's own methods, and its images in mini-batches."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.models import SCRModel
from avalanche.training.plugins.gdumb import GDumbPlugin
from avalanche.training.plugins.mir import MIRPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised.der import DER
from avalanche.training.supervised.er_ace import ER_ACE
from avalanche.training.supervised.supervised_contrastive_replay import SCR
from torch import nn
from torchvision import transforms

from hmn_replay.avalanche.buffer import (
    MemoryBuffer,
    add_to_minibatch,
    as_avalanche_dataset,
    count_labels,
    finish_images,
)
from hmn_replay.avalanche.kinds import HMNReplay, RawReplay
from hmn_replay.avalanche.streams import Normalization
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.replay import DecodedImages
from tests.streams import (
    Images,
    KeepFirst,
    in_pieces,
    make_model,
    make_strategy,
    raw_memory,
    streams,
    train,
    weights,
)
from tests.support import TINY


class Recorder(SupervisedPlugin[Any]):
    """Notes the labels of each training mini-batch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels: list[list[int]] = []

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.labels.append(strategy.mb_y.tolist())


def items_of(buffer: MemoryBuffer) -> list[Any]:
    return [buffer.buffer[position] for position in range(len(buffer.buffer))]


def with_replay(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    plugin = ReplayPlugin(mem_size=buffer.max_size, batch_size_mem=6, storage_policy=buffer)
    return make_strategy([plugin, recorder])


def with_gdumb(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    plugin: Any = GDumbPlugin()
    plugin.storage_policy = buffer
    return make_strategy([plugin, recorder])


def with_mir(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    plugin: Any = MIRPlugin(batch_size_mem=3, subsample=6)
    plugin.storage_policy = buffer
    return make_strategy([plugin, recorder])


def with_er_ace(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    strategy = make_strategy([recorder], ER_ACE, batch_size_mem=6)
    strategy.storage_policy = buffer
    return strategy


def with_der(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    strategy = make_strategy([recorder], DER, batch_size_mem=6)
    strategy.storage_policy = buffer
    return strategy


def with_scr(buffer: MemoryBuffer, recorder: Recorder) -> Any:
    model = SCRModel(nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), projection=nn.Linear(8, 4))
    strategy = SCR(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        mem_size=8,
        batch_size_mem=6,
        train_mb_size=8,
        eval_mb_size=8,
        plugins=[recorder],
        evaluator=make_strategy().evaluator,
    )
    strategy.replay_plugin.storage_policy = buffer
    return strategy


@pytest.mark.parametrize(
    ("make", "kind", "options", "parts"),
    [
        (with_replay, "nc", {}, 3),
        (with_replay, "ci", {}, 2),
        (with_gdumb, "nc", {}, 3),
        (with_gdumb, "ci", {}, 2),
        (with_er_ace, "nc", {}, 3),
        (with_er_ace, "ci", {"task_labels": True}, 3),
        (with_mir, "nc", {}, 3),
        (with_mir, "ci", {"task_labels": True}, 3),
        (with_der, "nc", {"logits": True}, 4),
        (with_scr, "nc", {}, 3),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Converting a tensor:UserWarning")
def test_avalanches_methods_replay_from_a_memory(
    make: Callable[[MemoryBuffer, Recorder], Any], kind: str, options: dict[str, Any], parts: int
) -> None:
    buffer, recorder = MemoryBuffer(KeepFirst(per_class=4), **options), Recorder()
    strategy = make(buffer, recorder)
    before = weights(strategy)
    train(strategy, streams(kind).train_stream)
    memory: Any = buffer.replay.memory
    items = items_of(buffer)
    assert len(items) == 16 and {len(item) for item in items} == {parts}
    decoded, labels = memory.decode(dtype=torch.uint8)
    for item, image, label in zip(items, decoded, labels, strict=True):
        assert torch.equal(item[0], image.float() / 255) and item[1] == int(label)
        if parts > 2:
            assert item[2] == 0
    strategy.eval(streams(kind).test_stream)
    assert not torch.equal(weights(strategy), before)
    if make in (with_replay, with_gdumb, with_der, with_scr):
        # In the second experience, images of the first were shown.
        assert {0, 1} < {label for labels in recorder.labels[-2:] for label in labels}
    if make is with_er_ace:
        assert set(strategy.mb_buffer_y.tolist()) <= {0, 1, 2, 3} and len(strategy.mb_buffer_y) == 6


def test_ders_logits_are_those_of_the_network_when_the_memory_was_made() -> None:
    augmented = KeepFirst(per_class=4, replay_transform=lambda images: 1 - images)
    buffer = MemoryBuffer(augmented, logits=True)
    model = nn.Sequential(make_model(), nn.Dropout())
    model[0].eval()
    strategy = make_strategy([], model=model)
    state = torch.get_rng_state()
    strategy.experience = streams().train_stream[0]
    buffer.update(strategy)
    assert torch.get_rng_state().equal(state)
    assert (model[0].training, model[1].training, model.training) == (False, True, True)
    images = torch.stack([item[0] for item in items_of(buffer)])
    logits = torch.stack([item[3] for item in items_of(buffer)])
    assert torch.allclose(logits, model.eval()(1 - images), atol=1e-6)
    buffer.resize(strategy, 3)
    assert len(buffer.buffer) == 3 and len(buffer.buffer[0]) == 4


def test_logits_of_another_memory_are_refused_until_they_are_made_anew() -> None:
    replay = RawReplay(3000)
    buffer, strategy = MemoryBuffer(replay, logits=True), make_strategy([])
    first, second = streams().train_stream
    buffer.post_adapt(strategy, first)
    state, wanted = replay.state_dict(), [item[3] for item in items_of(buffer)]
    buffer.post_adapt(strategy, second)
    assert not torch.equal(items_of(buffer)[-1][3], wanted[-1])
    replay.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"logits are of another memory .* resize\(strategy"):
        len(buffer.buffer)
    buffer.resize(strategy, buffer.max_size)
    assert all(a.equal(b[3]) for a, b in zip(wanted, items_of(buffer), strict=True))
    restored = pickle.loads(pickle.dumps(buffer))
    assert all(a.equal(b[3]) for a, b in zip(wanted, items_of(restored), strict=True))


def test_a_buffer_does_not_see_the_network_from_its_beginning() -> None:
    with pytest.raises(ConfigError, match='matching_networks="own" is for a plugin'):
        MemoryBuffer(HMNReplay(6000, matching_networks="own"))


@pytest.mark.parametrize("option", [{"tune": "all"}, {"distill": 1.0}, {"recode_share": 0.5}])
def test_options_of_a_training_that_a_buffer_does_not_see_are_refused(
    option: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is for a plugin, which sees"):
        MemoryBuffer(RawReplay(3000, **option))


def test_a_plugin_of_the_strategy_is_no_buffer_too() -> None:
    replay = KeepFirst()
    strategy = make_strategy(
        [replay, ReplayPlugin(8, storage_policy=MemoryBuffer(replay, max_size=8))]
    )
    with pytest.raises(ConfigError, match=r"among the strategy's plugins.*take it out"):
        strategy.train(streams().train_stream[0])


def test_images_are_normalised_as_the_benchmark_does_and_not_augmented() -> None:
    normalise = transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    data = Images(transform=normalise)
    buffer = MemoryBuffer(KeepFirst(replay_transform=lambda images: images.flip(3)))
    strategy = make_strategy([])
    buffer.post_adapt(strategy, streams(data=data).train_stream[0])
    memory: Any = buffer.replay.memory
    for item, image in zip(items_of(buffer), memory.decode(dtype=torch.uint8)[0], strict=True):
        assert torch.equal(item[0], normalise(image.float().div(255).flip(2)))


def test_the_size_is_bounded_by_the_memory_or_by_number_with_classes_alike() -> None:
    strategy, (first, second) = make_strategy([]), streams().train_stream
    buffer = MemoryBuffer(KeepFirst(per_class=4))
    assert buffer.max_size == sys.maxsize and len(buffer.buffer) == 0
    buffer.post_adapt(strategy, first)
    assert len(buffer.buffer) == 8 and buffer.buffer is buffer.buffer
    buffer.post_adapt(strategy, second)
    assert len(buffer.buffer) == 16
    buffer.resize(strategy, 6)
    assert buffer.max_size == 6
    labels = [label for _, label, *_ in items_of(buffer)]
    assert len(labels) == 6 and {labels.count(label) for label in range(4)} == {1, 2}
    assert buffer.replay.memory is not None and buffer.replay.memory.num_images == 16
    buffer.resize(strategy, 100)
    assert len(buffer.buffer) == 16
    with pytest.raises(ConfigError, match="max_size must be a whole number of 1 or more"):
        MemoryBuffer(KeepFirst(), max_size=0)


def test_pieces_of_an_online_stream_are_gathered() -> None:
    online = list(in_pieces(streams().train_stream, 5, access_task_boundaries=True))
    buffer = MemoryBuffer(KeepFirst())
    for piece in online:
        buffer.post_adapt(make_strategy(), piece)
    assert [len(images) for images in buffer.replay.given] == [20, 20]  # type: ignore[attr-defined]
    assert not buffer.replay.finish() and len(buffer.buffer) == 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_condensed_memory_is_replayed_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    stream = streams().train_stream
    replay = HMNReplay(6000, **{**TINY, "beta_grid": (0.5,)})
    strategy = with_replay(MemoryBuffer(replay), Recorder())
    train(strategy, stream[:1], seed=0)
    save_checkpoint(strategy, tmp_path / "checkpoint.pt")
    resumed, _ = maybe_load_checkpoint(make_strategy(), tmp_path / "checkpoint.pt")
    for going in (strategy, resumed):
        train(going, stream[1:], seed=1)
    assert torch.equal(weights(strategy), weights(resumed))
    buffers = [going.plugins[0].storage_policy.buffer for going in (strategy, resumed)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*buffers, strict=True))
    assert replay.memory is not None and replay.memory.file_bytes <= 6000
    assert len(buffers[0]) == replay.memory.num_images
    assert replay.loss_used is None and replay.report[0]["loss_used"] is None


KEYS = torch.tensor([-3, 0, 0, 1, 1, 5, (4 << 32) | 2])
PIXELS = (12 * torch.arange(7, dtype=torch.uint8)).view(7, 1, 1, 1).expand(7, 3, 8, 8)


@pytest.fixture
def decoded() -> DecodedImages:
    return DecodedImages.of(raw_memory(PIXELS, KEYS), torch.device("cpu"))


def test_labels_of_task_0_that_a_network_has_are_counted(decoded: DecodedImages) -> None:
    assert decoded.images.dtype == torch.uint8 and len(decoded) == 7
    assert count_labels(decoded, 4).tolist() == [2, 2, 0, 0]


def test_images_are_drawn_uniformly_and_none_twice(
    decoded: DecodedImages, untouched_random_state: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(7)
    for _ in range(700):
        images, labels, soft = decoded.draw(3, torch.float32, generator)
        assert soft is None
        indices = images[:, 0, 0, 0].mul(255).round().long() // 12
        assert len(set(indices.tolist())) == 3
        assert torch.equal(labels, decoded.labels[indices])
        assert torch.equal(images, PIXELS[indices].float() / 255)
        drawn[indices] += 1
    assert float((drawn - 300).abs().max()) < 60
    assert len(decoded.draw(50, torch.float16, generator)[0]) == 7


def test_images_are_augmented_and_then_normalised() -> None:
    images = torch.rand(2, 3, 4, 4)
    normalization = Normalization((0.5,), (0.5,))
    assert finish_images(images, None, None) is images
    found = finish_images(images, lambda x: x.flip(3), normalization)
    assert torch.equal(found, (images.flip(3) - 0.5) / 0.5)


def test_a_minibatch_without_task_labels_gets_none() -> None:
    mbatch = [torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64)]
    images, labels, tasks = torch.ones(1, 3, 4, 4), torch.ones(1).long(), torch.ones(1).long()
    add_to_minibatch(mbatch, images, labels, tasks)
    assert [len(part) for part in mbatch] == [3, 3]
    mbatch.append(torch.zeros(3, dtype=torch.int64))
    add_to_minibatch(mbatch, images, labels, tasks)
    assert [len(part) for part in mbatch] == [4, 4, 4] and mbatch[2].tolist() == [0, 0, 0, 1]
    mbatch.append(torch.zeros(4))
    with pytest.raises(DataError, match="task labels or none"):
        add_to_minibatch(mbatch, images, labels, tasks)


def test_a_data_set_has_the_labels_of_its_keys(decoded: DecodedImages) -> None:
    data: Any = as_avalanche_dataset(decoded, Normalization((0.5,), (0.5,)), with_tasks=True)
    image, label, task = data[6]
    assert torch.equal(image, (PIXELS[6].float() / 255 - 0.5) / 0.5)
    assert (label, task) == (2, 4)
    assert list(data.targets) == [-3, 0, 0, 1, 1, 5, 2]
    assert list(data.targets_task_labels) == [0, 0, 0, 0, 0, 0, 4]
    assert len(as_avalanche_dataset(decoded, None, with_tasks=False)[0]) == 2


def test_a_buffer_refuses_soft_labels() -> None:
    with pytest.raises(ConfigError, match="leave labels out"):
        MemoryBuffer(RawReplay(3000, labels="soft"))


def test_a_buffer_is_of_a_plugin() -> None:
    with pytest.raises(ConfigError, match=r"is of a plugin, .*; got '300 KiB'"):
        MemoryBuffer("300 KiB")  # type: ignore[arg-type]

"""The adapter to Mammoth, by the calls that its models make; Mammoth itself is not imported.

The signatures, and the models below, follow the source of aimagelab/mammoth, utils/buffer.py and
models/er.py, er_ace.py and derpp.py, at e75a491.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmn_replay import MammothBuffer, ReplayMemory
from hmn_replay.data.images import LabelledImages
from hmn_replay.errors import CheckpointError, ConfigError
from tests.support import real_set

SIGNATURES = {
    "add_data": [
        "examples",
        "labels",
        "logits",
        "task_labels",
        "attention_maps",
        "true_labels",
        "sample_selection_scores",
    ],
    "get_data": [
        "size",
        "transform",
        "return_index",
        "device",
        "mask_task_out",
        "cpt",
        "return_not_aug",
        "not_aug_transform",
        "force_indexes",
    ],
    "get_balanced_data": ["size", "transform", "n_classes"],
    "get_data_by_index": ["indexes", "transform", "device"],
    "get_all_data": ["transform", "device"],
    "get_dataloader": ["args", "batch_size", "shuffle", "drop_last", "transform", "sampler"],
    "is_empty": [],
    "is_full": [],
    "empty": [],
    "serialize": ["out_device"],
    "to": ["device"],
}


def make(budget: int = 100_000, **options: Any) -> MammothBuffer:
    return MammothBuffer(ReplayMemory(budget, "raw", **options))


def task(*classes: int, each: int = 6) -> tuple[Tensor, Tensor]:
    data = real_set(classes=classes, counts=[each] * len(classes), seed=classes[0])
    return data.images / 255, data.labels


def filled(*tasks: tuple[int, ...], with_tasks: bool = False) -> MammothBuffer:
    buffer = make()
    for number, classes in enumerate(tasks):
        images, labels = task(*classes)
        told: dict[str, Any] = (
            {"task_labels": torch.full((len(labels),), number)} if with_tasks else {}
        )
        buffer.add_data(examples=images, labels=labels, **told)
        buffer.end_task()
    return buffer


@pytest.mark.parametrize("name", SIGNATURES)
def test_methods_take_what_mammoths_take(name: str) -> None:
    parameters = list(inspect.signature(getattr(MammothBuffer, name)).parameters)
    assert parameters == ["self", *SIGNATURES[name]]


class Model(nn.Module):
    """What Mammoth's models have in common, as far as these loops need it."""

    def __init__(self, buffer: MammothBuffer) -> None:
        super().__init__()
        self.buffer, self.device = buffer, torch.device("cpu")
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
        self.opt = torch.optim.SGD(self.net.parameters(), lr=0.05)
        self.sizes: list[int] = []

    def transform(self, image: Tensor) -> Tensor:
        assert image.shape == (3, 8, 8)
        return (image.flip(2) - 0.5) / 0.5

    def step(self, loss: Tensor) -> None:
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()

    def er(self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor) -> None:
        real_batch_size = inputs.shape[0]
        if not self.buffer.is_empty():
            buf_inputs, buf_labels = self.buffer.get_data(
                4, transform=self.transform, device=self.device
            )
            inputs, labels = torch.cat((inputs, buf_inputs)), torch.cat((labels, buf_labels))
        self.sizes.append(len(inputs))
        self.step(F.cross_entropy(self.net(inputs), labels))
        self.buffer.add_data(examples=not_aug_inputs, labels=labels[:real_batch_size])

    def derpp(self, inputs: Tensor, labels: Tensor, not_aug_inputs: Tensor) -> None:
        outputs = self.net(inputs)
        loss = F.cross_entropy(outputs, labels)
        if not self.buffer.is_empty():
            kept = self.buffer.get_data(4, transform=self.transform, device=self.device)
            buf_inputs, _, buf_logits = kept
            loss = loss + F.mse_loss(self.net(buf_inputs), buf_logits)
            buf_inputs, buf_labels, _ = self.buffer.get_data(4, transform=self.transform)
            loss = loss + F.cross_entropy(self.net(buf_inputs), buf_labels)
        self.sizes.append(len(inputs))
        self.step(loss)
        self.buffer.add_data(examples=not_aug_inputs, labels=labels, logits=outputs.data)


@pytest.mark.parametrize("method", ["er", "derpp"])
def test_a_model_trains_with_it(method: str) -> None:
    model = Model(make())
    seen = []
    memory = None
    for classes in ((0, 1), (2, 3), (4, 5)):
        images, labels = task(*classes)
        for _ in range(2):
            for part in torch.randperm(12).split(6):
                getattr(model, method)(images[part].flip(3), labels[part], images[part])
        model.buffer.end_task(model.net if method == "derpp" else None)
        memory = model.buffer.memory.memory
        assert memory is not None
        seen.append(memory.images_per_class)
    # Every image is kept once, however many epochs it came in.
    assert seen == [[6] * 2, [6] * 4, [6] * 6]
    if method == "er":
        assert model.sizes == [6] * 4 + [10] * 8
    assert memory is not None
    pixels = {bytes(image) for image in memory.decode(dtype=torch.uint8)[0].numpy()}
    given = torch.cat([task(*pair)[0] for pair in ((0, 1), (2, 3), (4, 5))])
    assert pixels == {bytes(image) for image in given.mul(255).round().to(torch.uint8).numpy()}


def test_nothing_of_the_current_task_is_replayed_until_it_ends() -> None:
    buffer = make()
    images, labels = task(0, 1)
    buffer.add_data(images, labels)
    assert buffer.is_empty() and len(buffer) == buffer.num_seen_examples == 0
    assert buffer.used_attributes == []
    with pytest.raises(ConfigError, match="the buffer is empty"):
        buffer.get_data(2)
    with pytest.raises(ConfigError, match="the buffer is empty"):
        buffer.get_balanced_data(2)
    buffer.end_task()
    assert not buffer.is_empty() and len(buffer) == buffer.buffer_size == 12
    assert buffer.used_attributes == ["examples", "labels"]


def test_what_is_drawn_is_what_is_there() -> None:
    buffer = filled((0, 1), (2, 3))
    everything, labels = buffer.get_all_data()
    assert torch.equal(buffer.examples, everything) and torch.equal(buffer.labels, labels)
    first, second = (buffer.get_data(5, return_index=True) for _ in range(2))
    assert not torch.equal(first[0], second[0])
    for index, images, own in (first, second):
        assert len(index.unique()) == 5
        assert torch.equal(images, everything[index]) and torch.equal(own, labels[index])
    assert len(buffer.get_data(1000)[0]) == len(buffer)
    images, own = buffer.get_data(3, force_indexes=[7, 0, 7])
    assert torch.equal(images, everything[[7, 0, 7]])
    assert torch.equal(buffer.get_data_by_index([3, 1])[0], everything[[3, 1]])
    plain, turned, own = buffer.get_data(
        4, lambda image: image.flip(2), return_not_aug=True, not_aug_transform=lambda image: -image
    )
    assert torch.equal(plain.neg().flip(3), turned) and len(own) == 4


def test_images_of_a_task_can_be_left_out() -> None:
    buffer = filled((0, 1), (2, 3))
    assert set(buffer.get_data(100, mask_task_out=1, cpt=2)[1].tolist()) == {0, 1}
    with pytest.raises(ConfigError, match="task labels, or cpt"):
        buffer.get_data(3, mask_task_out=1)
    buffer = filled((4, 0), (2, 1), with_tasks=True)
    images, labels, tasks = buffer.get_data(100, mask_task_out=0)
    assert set(labels.tolist()) == {1, 2} and set(tasks.tolist()) == {1} and len(images) == 12
    assert buffer.used_attributes == ["examples", "labels", "task_labels"]
    buffer = filled((4, 0), with_tasks=True)
    with pytest.raises(ConfigError, match="nothing to draw but images of task 0"):
        buffer.get_data(5, transform=torch.clone, mask_task_out=0)


def test_a_balanced_draw_takes_as_many_of_every_class() -> None:
    buffer = filled((0, 1), (2,))
    assert sorted(buffer.get_balanced_data(7)[1].bincount().tolist()) == [2, 2, 3]
    labels = buffer.get_balanced_data(6, n_classes=2)[1]
    assert sorted(labels.unique(return_counts=True)[1].tolist()) == [3, 3]


def test_logits_are_the_networks_own() -> None:
    buffer, network = filled((0, 1)), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    buffer.end_task(network)
    images, _, logits = buffer.get_data(3)
    with torch.no_grad():
        torch.testing.assert_close(network(images), logits)


def test_a_network_says_its_logits_where_it_is() -> None:
    buffer, network = filled((0, 1)), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    buffer.to("meta")  # as a GPU is, not where the network is
    buffer.end_task(network)
    buffer.to("cpu")
    with torch.no_grad():
        assert network(buffer.examples).equal(buffer.get_all_data()[2])


def test_logits_of_another_memory_are_not_returned() -> None:
    buffer, network = filled((0, 1)), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    buffer.end_task(network)
    for same in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert same.get_all_data()[2].equal(buffer.get_all_data()[2])
    assert len(pickle.dumps(buffer)) < len(pickle.dumps(filled((0, 1)))) + 2000
    buffer.memory.update(*task(2))
    for ask in (buffer.get_all_data, lambda: buffer.get_data(3), lambda: buffer.used_attributes):
        with pytest.raises(ConfigError, match=r"of another memory .* call end_task\(network\)"):
            ask()
    assert len(buffer) == 18 and len(buffer.labels) == 18
    later = make()
    later.load_state_dict(buffer.serialize())
    assert later.used_attributes == ["examples", "labels"]
    buffer.end_task(network)
    assert len(buffer.get_all_data()[2]) == 18
    buffer.memory.update(*task(3))
    buffer.end_task()
    assert buffer.used_attributes == ["examples", "labels"]


def test_positions_may_be_tensors_lists_or_arrays() -> None:
    buffer = filled((0, 1))
    wanted = buffer.examples[torch.tensor([3, 0])]
    for positions in (torch.tensor([3, 0]), [3, 0], np.array([3, 0])):
        assert buffer.get_data_by_index(positions)[0].equal(wanted)


def test_a_selection_by_the_network_sees_the_one_of_the_task() -> None:
    shown: list[nn.Module] = []

    def in_order(images: LabelledImages, model: nn.Module) -> Tensor:
        shown.append(model)
        return torch.arange(len(images))

    buffer, network = make(selection=in_order), nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    buffer.add_data(*task(0, 1))
    buffer.end_task(network)
    assert shown == [network] and len(buffer) == 12


def test_images_that_could_not_be_taken_are_not_taken_for_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    buffer = make()
    gather = buffer.memory.gather

    def fail(images: LabelledImages) -> None:
        raise MemoryError

    monkeypatch.setattr(buffer.memory, "gather", fail)
    with pytest.raises(MemoryError):
        buffer.add_data(*task(0, 1))
    monkeypatch.setattr(buffer.memory, "gather", gather)
    buffer.add_data(*task(0, 1))
    buffer.end_task()
    assert len(buffer) == 12


def test_equal_images_of_several_classes_are_all_kept() -> None:
    buffer, image = make(), task(0)[0][:1]
    for _ in range(2):
        buffer.add_data(image.expand(4, -1, -1, -1), torch.arange(4))
    buffer.end_task()
    images, labels = buffer.get_all_data()
    assert labels.tolist() == [0, 1, 2, 3]
    assert all(each.equal(image[0]) for each in images)


def test_a_draw_of_none_is_empty() -> None:
    buffer = filled((0, 1))
    for draw in (buffer.get_data, buffer.get_balanced_data):
        images, labels = draw(0, transform=lambda image: image.flip(2))
        assert images.shape == (0, 3, 8, 8) and labels.shape == (0,)
        assert images.dtype == torch.float32


def test_a_network_that_gives_logits_is_in_evaluation_mode_and_stays_as_it_is() -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 4), nn.Dropout())
    buffer = make()
    buffer.add_data(*task(0, 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    buffer.end_task(network)
    assert all(module.training for module in network.modules())
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    _, _, logits = buffer.get_all_data()
    torch.testing.assert_close(logits, network.eval()(buffer.examples).detach())


def test_features_are_no_images() -> None:
    with pytest.raises(ConfigError, match="holds images, which a memory of features cannot"):
        MammothBuffer(ReplayMemory("4 KiB", "raw-features"))


def test_a_loader_and_items_are_those_of_the_buffer() -> None:
    buffer = filled((0, 1))
    loader = buffer.get_dataloader(Namespace(), 5, shuffle=True, transform=lambda image: -image)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    shown = torch.cat([images for images, _ in batches]).neg().flatten(1).sum(1).sort().values
    torch.testing.assert_close(shown, buffer.examples.flatten(1).sum(1).sort().values)
    items = list(buffer)
    assert len(items) == 12 and torch.equal(items[3][0], buffer.examples[3])


def test_batches_go_to_a_module_that_takes_batches() -> None:
    class KorniaAugNoGrad(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.ndim == 4
            return images + 1

    images, _ = filled((0,)).get_data(3, transform=KorniaAugNoGrad())
    assert float(images.min()) >= 1


def test_a_checkpoint_goes_on_with_the_same_bits() -> None:
    first = filled((0, 1), (2, 3), with_tasks=True)
    first.end_task(lambda images: images.mean(dim=(2, 3)))
    images, labels = task(4, 5)
    first.add_data(images[:7], labels[:7])
    first.get_data(2)
    file = io.BytesIO()
    torch.save(first.serialize(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    ends = []
    for buffer in (first, second):
        drawn = buffer.get_data(4)
        buffer.add_data(images, labels)
        buffer.end_task()
        assert buffer.memory.memory is not None
        ends.append([[part.tolist() for part in drawn], buffer.memory.memory.to_bytes()])
        assert buffer.memory.memory.images_per_class == [6] * 6
    assert ends[0] == ends[1]
    with pytest.raises(CheckpointError, match="not a state of a MammothBuffer"):
        second.load_state_dict({"examples": torch.zeros(3)})


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("tasks", torch.zeros(2, 3, dtype=torch.int64)),
        ("tasks", torch.zeros(2, 2)),
        ("tasks", [[0, 1]]),
        ("seen", torch.zeros(3, dtype=torch.uint8)),
        ("seen", torch.zeros(3, 8)),
        ("num_draws", -1),
        ("num_draws", "many"),
        ("logits", torch.zeros(3, 4)),
        ("logits", 3),
        ("memory", {}),
        ("memory", 3),
    ],
)
def test_a_state_of_something_else_changes_nothing(part: str, value: Any) -> None:
    buffer, other = filled((0, 1), with_tasks=True), filled((2, 3), with_tasks=True)
    buffer.end_task(lambda images: images.flatten(1))
    state = {**other.serialize(), part: value}
    with pytest.raises(CheckpointError, match="not a state of a MammothBuffer: "):
        make().load_state_dict(state)
    before = buffer.serialize()
    with pytest.raises(CheckpointError):
        buffer.load_state_dict(state)
    after = buffer.serialize()
    assert after["memory"]["digest"] == before["memory"]["digest"]
    for name in ("tasks", "seen", "logits"):
        assert after[name].equal(before[name])
    assert after["num_draws"] == before["num_draws"]


def test_it_can_be_emptied() -> None:
    buffer = filled((0, 1), with_tasks=True)
    buffer.empty()
    assert buffer.is_empty() and not buffer.is_full()
    buffer.add_data(*task(2, 3))
    buffer.end_task()
    assert buffer.labels.unique().tolist() == [2, 3]


def test_what_a_memory_cannot_keep_is_refused() -> None:
    buffer = make()
    images, labels = task(0, 1)
    with pytest.raises(ConfigError, match=r"expected labels .* ER-ACE or DER\+\+"):
        buffer.add_data(images, logits=torch.zeros(12, 4))
    with pytest.raises(ConfigError, match="no attention maps"):
        buffer.add_data(images, labels, attention_maps=[images])

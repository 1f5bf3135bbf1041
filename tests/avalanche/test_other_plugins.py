"""The plugin beside others, with heads that grow, and after what went wrong."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier
from avalanche.training.plugins.from_scratch_training import FromScratchTrainingPlugin
from torch import Tensor, nn
from torch.utils.data import Dataset

from hmn_replay.avalanche.kinds import HMNReplay
from hmn_replay.errors import ConfigError, DataError, HMNReplayWarning
from tests.streams import (
    Images,
    KeepFirst,
    labelled_streams,
    make_model,
    make_strategy,
    streams,
    train,
)
from tests.support import TINY


class Growing(nn.Module):
    """A network whose head has a unit for each class that has come."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.head: Any = IncrementalClassifier(16)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


class Doing(SupervisedPlugin[Any]):
    """Does something at one of Avalanche's callbacks."""

    def __init__(self, **actions: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name, action in actions.items():
            setattr(self, name, action)


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def warned(plugins: list[Any]) -> list[str]:
    """Train with plugins, and return this package's warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        train(make_strategy(plugins), streams().train_stream)
    return [str(each.message) for each in found if each.category is HMNReplayWarning]


# Heads.


@pytest.mark.parametrize("first", [0, 1])
def test_a_growing_head_learns_the_classes_of_a_memory_from_elsewhere(first: int) -> None:
    stream = streams().train_stream
    before = KeepFirst()
    train(make_strategy([before], model=Growing()), [stream[first]])
    replay = KeepFirst()
    replay.memory = before.memory
    model = Growing()
    strategy = make_strategy([replay], model=model, train_epochs=3)
    train(strategy, [stream[1 - first]])
    old = before.memory.classes.tolist()
    assert model.head.active_units[old].all()
    logits = model(before.memory.decode()[0])[:, old]
    assert logits.abs().max() < 100 and logits.std() > 0


def test_a_growing_head_is_as_without_the_plugin_where_the_stream_is_its_own() -> None:
    stream = streams().train_stream
    one, other = Growing(), Growing()
    other.load_state_dict(one.state_dict())
    train(make_strategy([KeepFirst(batch_size_mem=1)], model=one), stream)
    train(make_strategy(model=other), stream)
    assert one.head.active_units.equal(other.head.active_units)
    assert one.head.classifier.weight.shape == other.head.classifier.weight.shape


def test_a_class_of_the_memory_without_a_logit_is_refused() -> None:
    replay = KeepFirst()
    train(make_strategy([replay]), labelled_streams((2, 3)).train_stream)
    small = make_strategy([replay], model=make_model(2))
    with pytest.raises(ConfigError, match="a class of label 3, and the network 2 logits"):
        train(small, labelled_streams((0, 1)).train_stream)


# Other plugins.


@pytest.mark.parametrize("is_first", [True, False])
def test_a_plugin_that_changes_the_network_before_it_is_distilled_is_warned_of(
    is_first: bool,
) -> None:
    def change(strategy: Any, **_: Any) -> None:
        with torch.no_grad():
            strategy.model[-1].weight.zero_()

    replay, other = KeepFirst(distill=1.0), Doing(before_training_exp=change)
    plugins = [replay, other] if is_first else [other, replay]
    assert (
        any("name KeepFirst first among the plugins" in each for each in warned(plugins))
        != is_first
    )


def test_a_network_that_begins_anew_has_none_before_it_to_distil() -> None:
    seen: list[float] = []
    replay = KeepFirst()
    watch = Doing(before_training_epoch=lambda *_, **__: seen.append(replay.distill_used))
    train(make_strategy([FromScratchTrainingPlugin(), replay, watch]), streams().train_stream)
    assert seen == [0.0, 0.0]


def test_a_frozen_part_that_is_unfrozen_later_stays_as_it_was_in_what_is_distilled() -> None:
    model: Any = make_model()
    noted: list[tuple[Tensor, Tensor]] = []
    replay = KeepFirst(distill=1.0)

    def begin(strategy: Any, **_: Any) -> None:
        model[1].requires_grad_(False)

    def unfreeze(strategy: Any, **_: Any) -> None:
        if strategy.clock.train_exp_epochs == 1:
            model[1].requires_grad_(True)

    def note(strategy: Any, **_: Any) -> None:
        teacher: Any = replay._teacher
        if teacher is not None:
            noted.append((teacher.network[1].weight.clone(), model[1].weight.detach().clone()))

    plugins = [
        Doing(before_training_exp=begin),
        replay,
        Doing(before_training_epoch=unfreeze, after_training_epoch=note),
    ]
    train(make_strategy(plugins, model=model, train_epochs=3), streams().train_stream)
    (first, own), (second, moved), (third, _) = noted
    assert first.equal(second) and second.equal(third) and first.equal(own)
    assert not moved.equal(own)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_loss_that_another_plugin_has_scaled_is_warned_of(is_first: bool) -> None:
    def scale(strategy: Any, **_: Any) -> None:
        strategy.loss = strategy.loss / 4

    replay, other = KeepFirst(distill=0), Doing(before_backward=scale)
    plugins = [replay, other] if is_first else [other, replay]
    assert any("name KeepFirst before that plugin" in each for each in warned(plugins)) != is_first


@pytest.mark.parametrize("is_first", [True, False])
def test_images_that_another_plugin_adds_behind_the_replayed_ones_are_refused(
    is_first: bool,
) -> None:
    def add(strategy: Any, **_: Any) -> None:
        images, labels = strategy.mbatch[0], strategy.mbatch[1]
        strategy.mbatch[0] = torch.cat([images, torch.ones(5, *images.shape[1:])])
        strategy.mbatch[1] = torch.cat([labels, torch.full((5,), 3)])

    replay, other = KeepFirst(), Doing(before_training_iteration=add)
    strategy = make_strategy([replay, other] if is_first else [other, replay])
    if is_first:
        with pytest.raises(ConfigError, match="name KeepFirst last among the plugins"):
            train(strategy, streams().train_stream)
    else:
        train(strategy, streams().train_stream)


# Runs that begin again.


def test_an_interrupted_experience_that_is_begun_again_is_in_the_memory_once() -> None:
    stream = streams().train_stream
    replay, other = KeepFirst(), Doing()
    strategy = make_strategy([replay, other])
    strategy.train(stream[0])
    other.after_training_iteration = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        strategy.train(stream[1])
    del other.after_training_iteration
    strategy.train(stream[1])
    assert len(replay.given) == 2
    # Once it has been trained on, it is taken for another one of the same images.
    strategy.train(stream[1])
    assert len(replay.given) == 3


def test_what_was_interrupted_is_made_into_another_memory() -> None:
    stream = streams().train_stream
    replay, other = KeepFirst(), Doing()
    strategy = make_strategy([replay, other])
    strategy.train(stream[0])
    state = replay.state_dict()
    other.after_training_iteration = stop  # type: ignore[method-assign]

    def load() -> None:
        replay.load_state_dict(state)

    def forget() -> None:
        replay.memory = None

    for take_back in (load, forget):
        with pytest.raises(KeyboardInterrupt):
            strategy.train(stream[1])
        before = len(replay.given)
        take_back()
        with pytest.raises(KeyboardInterrupt):
            strategy.train(stream[1])
        assert len(replay.given) == before + 1


def test_a_learned_memory_has_no_image_of_an_interrupted_experience_twice() -> None:
    stream = streams(data=Images(each=30)).train_stream
    options = {**TINY, "device": "cpu", "kind": "fred", "outer_steps": 0, "over_budget": 0.0}
    memories: list[Any] = []
    for is_interrupted in (False, True):
        replay, other = HMNReplay("4 KiB", progress=False, **options), Doing()
        strategy = make_strategy([replay, other])
        strategy.train(stream[0])
        if is_interrupted:
            other.after_training_iteration = stop  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                strategy.train(stream[1])
            del other.after_training_iteration
        strategy.train(stream[1])
        memories.append(replay.memory)
    assert memories[0].to_bytes() == memories[1].to_bytes()


def test_another_network_is_not_distilled_after_a_state_was_loaded() -> None:
    stream = streams().train_stream
    replay = KeepFirst(distill=None)
    strategy = make_strategy([replay])
    strategy.train(stream[0])
    used = []
    for is_same in (True, False):
        loaded, model = KeepFirst(), make_model()
        loaded.load_state_dict(replay.state_dict())
        if is_same:
            model.load_state_dict(strategy.model.state_dict())
        make_strategy([loaded], model=model).train(stream[1])
        used.append(loaded.distill_used)
    assert used == [1.0, 0.0]
    copied = copy.deepcopy(replay)
    make_strategy([copied], model=make_model()).train(stream[1])
    assert copied.distill_used == 0.0


def test_a_plugin_that_another_run_has_filled_says_so() -> None:
    stream = streams().train_stream
    replay = KeepFirst()
    train(make_strategy([replay]), stream)
    with pytest.warns(HMNReplayWarning, match="a new run takes a new plugin"):
        train(make_strategy([replay]), stream[:1])
    replay.memory = None
    train(make_strategy([replay]), stream[:1])


# Items.


class Numbered(Dataset[Any]):
    def __init__(self) -> None:
        self.images = Images((0, 1), each=60)
        self.targets = self.images.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image, label = self.images[index]
        return image, label, index


def test_a_position_in_the_place_of_a_task_label_is_refused() -> None:
    data: Any = as_classification_dataset(Numbered())
    benchmark: Any = benchmark_from_datasets(train=[data])
    stream = benchmark.train_stream
    with pytest.raises(
        DataError, match=r"with 0, 60, 119 for a third part, which are no task labels"
    ):
        train(make_strategy([KeepFirst()]), stream)

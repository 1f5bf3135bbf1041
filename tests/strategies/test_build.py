"""What all strategies share: trained by one call, within the budget, again the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.logging import BaseLogger
from avalanche.training.plugins.evaluation import EvaluationPlugin
from avalanche.training.supervised import Naive

import strategies
from hmn_replay import RawReplay
from hmn_replay.errors import BudgetError, ConfigError, UnknownOptionError
from hmn_replay.evaluation import score
from tests.strategies.support import (
    BUDGET,
    accuracy,
    build,
    easy_set,
    make_stream,
    make_stream_without_tasks,
)

WITHOUT_MEMORY = ("naive", "joint")
WITH_MEMORY = [name for name in strategies.STRATEGIES if name not in WITHOUT_MEMORY]


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_what_is_stored_is_within_the_budget_after_every_experience(name: str) -> None:
    torch.manual_seed(0)
    strategy = build(name, epochs=2)
    assert strategies.memory_use(strategy) == strategies.MemoryUse(0, 0, 0.0)
    seconds = 0.0
    for number, experience in enumerate(make_stream(), 1):
        strategy.train(experience)
        use = strategies.memory_use(strategy)
        assert use.num_bytes <= BUDGET
        # Full, but where about as many images are stored as there were.
        assert use.num_bytes > 0.8 * BUDGET or use.num_images > 0.95 * 80 * number
        assert use.seconds > seconds
        seconds = use.seconds
        images, labels = strategies.memory_images(strategy)
        assert images.dtype == torch.uint8
        assert images.shape == (use.num_images, 3, 8, 8)
        assert labels.unique().tolist() == list(range(2 * number))
        assert labels.tolist() == sorted(labels.tolist())
    # Six classes, of which fine-tuning remembers two.
    assert accuracy(strategy) > 0.6


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_without_a_memory_nothing_is_stored(name: str) -> None:
    strategy = build(name)
    strategy.train(make_stream(num_per_class=8))
    assert strategies.memory_use(strategy) == strategies.MemoryUse(0, 0, 0.0)
    images, labels = strategies.memory_images(strategy)
    assert (len(images), len(labels)) == (0, 0)
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_seeding_the_global_generators_gives_the_same_bits_again(name: str) -> None:
    stream = make_stream(num_per_class=12, num_experiences=2)

    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        strategy = build(name, seed=5)
        for step in [stream] if name == "joint" else stream:
            strategy.train(step)
        state = strategy.model.state_dict().values()
        return [*state, *strategies.memory_images(strategy)]

    for first, second in zip(train(), train(), strict=True):
        assert first.equal(second)


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if name != "derpp"])
def test_samples_without_task_labels_are_enough(name: str) -> None:
    strategy = build(name)
    for experience in make_stream_without_tasks():
        strategy.train(experience)
        assert 0 < strategies.memory_use(strategy).num_bytes <= BUDGET


class Count(SupervisedPlugin[Any], supports_distributed=False):
    """Counts the images that a network is trained on."""

    seen = 0

    def after_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.seen += len(strategy.mb_x)


@pytest.mark.parametrize("name", ["hmn", "raw", "herding", "jpeg"])
def test_memory_only_shows_later_experiences_through_the_memory_alone(name: str) -> None:
    count = Count()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    strategy = build(name, mode="memory_only", plugins=[count], epochs=3)
    for number, experience in enumerate(make_stream(num_experiences=2), 1):
        count.seen = 0
        strategy.train(experience)
        use = strategies.memory_use(strategy)
        assert use.num_bytes <= BUDGET
        # From the second experience on for as many passes as with replay, in whole epochs.
        passes = 240 if number == 1 else 480
        assert abs(count.seen - passes) <= use.num_images / 2
        assert number == 1 or count.seen % use.num_images == 0
        assert strategies.memory_images(strategy)[1].unique().tolist() == list(range(2 * number))


@pytest.mark.parametrize("name", ["naive", "joint"])
def test_memory_only_changes_nothing_where_there_is_no_memory(name: str) -> None:
    count = Count()  # type: ignore[no-untyped-call]
    strategy = build(name, mode="memory_only", plugins=[count], epochs=3)
    stream = make_stream(num_experiences=2)
    for step in [stream] if name == "joint" else stream:
        strategy.train(step)
    assert count.seen == 3 * sum(len(experience.dataset) for experience in stream)


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if name not in ("hmn", "fred")])
def test_a_budget_of_less_than_one_image_is_refused(name: str) -> None:
    with pytest.raises(BudgetError, match="does not hold one image"):
        build(name, 150).train(make_stream(num_per_class=4)[0])


@pytest.mark.parametrize("name", ["gdumb", "derpp", "er_ace", "avalanche-replay"])
def test_a_budget_of_one_image_is_enough(name: str) -> None:
    budget = 216 if name == "derpp" else 192
    strategy = build(name, budget)
    for experience in make_stream(num_per_class=4, num_experiences=2):
        strategy.train(experience)
        assert strategies.memory_use(strategy).num_bytes == budget
        assert strategies.memory_use(strategy).num_images == 1
    with pytest.raises(BudgetError, match=f"of {budget - 1} bytes does not hold one image"):
        build(name, budget - 1)


def test_a_rival_of_ones_own_is_built_by_its_name() -> None:
    def build_mine(settings: strategies.Settings) -> strategies.Strategy:
        assert settings.choose(power=1) == {"power": 3}
        return Naive(**settings.common(RawReplay(settings.budget_bytes, progress=False)))

    strategies.STRATEGIES.add("mine", build_mine)
    try:
        strategy = build("mine", power=3)
        strategy.train(make_stream(num_per_class=4)[0])
    finally:
        strategies.STRATEGIES.remove("mine")
    assert 0 < strategies.memory_use(strategy).num_bytes <= BUDGET


def test_an_unknown_name_is_refused_by_naming_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy must be one of naive, joint, hmn, .*; got 'icarl'"
    ):
        build("icarl")


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises((ConfigError, UnknownOptionError), match="zeta"):
        build(name, zeta=1)


@pytest.mark.parametrize("option", ["momentum", "weight_decay"])
def test_a_training_below_its_range_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} must be 0 or more; got -1"):
        build("naive", **{option: -1})


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mode must be one of .*; got 'both'"):
        build("raw", mode="both")
    for name in ("derpp", "er_ace"):
        with pytest.raises(ConfigError, match='no mode "memory_only"'):
            build(name, mode="memory_only")


@pytest.mark.parametrize(
    "options",
    [{"labels": "soft"}, {"distill": 2.0}, {"tune": "all"}, {"loss": "balanced"}],
    ids=lambda options: next(iter(options)),
)
def test_what_memory_only_does_not_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        build("jpeg", mode="memory_only", **options)


@pytest.mark.parametrize("name", ["raw", "lossless", "subsampled", "jpeg"])
def test_a_budget_too_small_for_the_classes_that_are_expected_is_refused(name: str) -> None:
    strategy = build(name, 1536, expected_classes=500)
    with pytest.raises(BudgetError, match="500 classes"):
        strategy.train(make_stream(num_per_class=8, num_experiences=1)[0])


def test_a_budget_may_be_written_out() -> None:
    strategy = build("avalanche-replay", "1.5 KiB")
    for experience in make_stream(num_per_class=8, num_experiences=1):
        strategy.train(experience)
    assert strategies.memory_use(strategy).num_images == 1536 // 192


def test_the_training_is_as_asked_for() -> None:
    strategy = build("naive", lr=0.2, momentum=0.5, weight_decay=1e-3, batch_size=4, epochs=7)
    (group,) = strategy.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.5, 1e-3)
    assert (strategy.train_mb_size, strategy.train_epochs) == (4, 7)
    assert strategy.device == torch.device("cpu")


def test_the_caller_evaluates_by_metrics_of_their_own() -> None:
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=BaseLogger())
    strategy = build("naive", evaluator=evaluator)
    assert strategy.evaluator is evaluator
    stream = make_stream(num_per_class=20)
    strategy.train(stream[0])
    (found,) = strategy.eval(stream).values()
    data = easy_set(20)
    assert found == pytest.approx(score(strategy.model, data.images, data.labels))

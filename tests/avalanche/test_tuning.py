"""The tuning of a network, or of its head, on the memory after an experience."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from torch import Tensor, nn

from hmn_replay.errors import CheckpointError, ConfigError, HMNReplayWarning
from tests.streams import (
    KeepFirst,
    in_pieces,
    labelled_streams,
    make_model,
    make_strategy,
    streams,
    train,
    weights,
)


def learn(stream: Any = None, model: nn.Module | None = None, **options: Any) -> Any:
    strategy = make_strategy([KeepFirst(batch_size_mem=4, **options)], model=model)
    train(strategy, streams().train_stream if stream is None else stream)
    return strategy


def parts(strategy: Any) -> tuple[Tensor, Tensor]:
    """Return the values of the network but its head, and those of the head."""
    *body, head = strategy.model
    rows = [torch.cat([p.flatten() for m in own for p in m.parameters()]) for own in (body, [head])]
    return rows[0].detach(), rows[1].detach()


def test_the_head_or_all_of_it_is_tuned_from_the_second_experience_on() -> None:
    stream = list(streams().train_stream)
    none, head, everything = (learn(stream[:1], tune=tune) for tune in ("none", "head", "all"))
    assert weights(none).equal(weights(head)) and weights(none).equal(weights(everything))
    (body, own), (tuned_body, tuned_head), (all_body, all_head) = (
        parts(learn(stream, tune=tune)) for tune in ("none", "head", "all")
    )
    assert tuned_body.equal(body) and not tuned_head.equal(own)
    assert not all_body.equal(body) and not all_head.equal(own)


class HeadFirst(nn.Module):
    """A network that registers its head first, and has a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        *body, self.head = make_model().children()
        self.body = nn.Sequential(*body)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.projector = nn.Linear(16, 8)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits


def test_the_head_is_what_makes_the_logits_wherever_it_stands() -> None:
    stream = list(streams().train_stream)
    (tuned, plain) = (learn(stream, HeadFirst(), tune=tune).model for tune in ("head", "none"))
    same = {
        name: all(map(torch.equal, own.parameters(), other.parameters()))
        for (name, own), other in zip(tuned.named_children(), plain.children(), strict=True)
    }
    assert same == {"head": False, "body": True, "projector": True}


def test_its_mini_batches_have_as_many_images_of_every_class() -> None:
    shown: list[Tensor] = []
    model = make_model()
    replay = KeepFirst(
        2, batch_size_mem=4, tune="all", tune_steps=5, replay_transform=lambda images: images
    )
    strategy = make_strategy([replay], model=model)
    stream = labelled_streams((0, 1), (2,)).train_stream
    train(strategy, stream[:1])
    calls = 0

    class Count(nn.CrossEntropyLoss):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            shown.append(labels.bincount(minlength=3))
            return super().forward(logits, labels)

    class Last(SupervisedPlugin[Any]):
        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            shown.clear()

    strategy._criterion = Count()
    strategy.plugins.insert(0, Last())  # type: ignore[no-untyped-call]
    strategy.train(stream[1])
    assert len(shown) == 5
    for counts in shown:
        assert int(counts.sum()) == 8 + 4
        assert counts.tolist() == [4, 4, 4]


def test_it_brings_the_loss_on_the_memory_down() -> None:
    def loss(strategy: Any) -> float:
        images, labels = strategy.plugins[0].memory.decode()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(strategy.model.eval()(images), labels))

    none = loss(learn())
    for tune in ("head", "all"):
        assert loss(learn(tune=tune, tune_steps=50, tune_rate=0.05)) < none


def test_it_keeps_to_the_network_as_it_was_unless_told_otherwise() -> None:
    class Copy(SupervisedPlugin[Any]):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.network = copy.deepcopy(strategy.model).eval()

    def moved(distill: float | None) -> float:
        """Return how far the last tuning moves the network's answers."""
        before, model = Copy(), make_model()  # type: ignore[no-untyped-call]
        model.register_forward_pre_hook(
            lambda own, inputs: inputs[0].flip(3) if own.training else None
        )
        replay = KeepFirst(
            batch_size_mem=4, tune="all", tune_steps=60, tune_rate=0.05, distill=distill
        )
        strategy = make_strategy([before, replay], model=model)
        train(strategy, streams().train_stream)
        assert len(strategy.model._forward_pre_hooks) == 1
        images = replay.memory.decode()[0].flip(3)  # as both were shown them
        with torch.no_grad():
            answers = [each(images).softmax(1) for each in (before.network, strategy.model.eval())]
        return float((answers[1] - answers[0]).norm())

    assert moved(20.0) < 0.5 * moved(0.0)
    assert moved(None) == moved(1.0) != moved(0.0)


def test_modes_gradients_statistics_and_the_random_state_stay() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.5), nn.Linear(192, 8), nn.Linear(8, 4)
    )
    torch.manual_seed(1)
    for layer in model[3:]:
        nn.init.normal_(layer.weight, std=0.1)  # type: ignore[arg-type]
    noted: list[Any] = []

    class Note(SupervisedPlugin[Any]):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            gradients = [p.grad.clone() for p in strategy.model.parameters()]
            modes = [module.training for module in strategy.model.modules()]
            norm = strategy.model[1]
            noted.append((gradients, modes, norm.running_mean.clone(), torch.get_rng_state()))

    replay = KeepFirst(batch_size_mem=4, tune="all")
    strategy = make_strategy([Note(), replay, Note()], model=model)  # type: ignore[no-untyped-call]
    train(strategy, streams().train_stream)
    before, after = noted[2:]
    assert all(a.equal(b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    assert before[2].equal(after[2]) and before[3].equal(after[3])


def test_soft_labels_are_those_of_the_tuned_network() -> None:
    answers = []
    for tune in ("none", "all"):
        strategy = learn(tune=tune, tune_rate=0.5, labels="soft", renew="before")
        answers.append(strategy.plugins[0].memory.soft_labels())
    assert not answers[0].equal(answers[1])


def test_a_run_that_goes_on_tunes_alike(tmp_path: Path) -> None:
    stream = streams(num_experiences=4).train_stream
    whole = make_strategy([KeepFirst(batch_size_mem=4, tune="all")])
    for number in range(4):
        train(whole, stream[number : number + 1], seed=number)
        if number == 1:
            save_checkpoint(whole, tmp_path / "stream.pt")
    resumed, _ = maybe_load_checkpoint(make_strategy(), tmp_path / "stream.pt")
    for number in (2, 3):
        train(resumed, stream[number : number + 1], seed=number)
    assert weights(resumed).equal(weights(whole))


@pytest.mark.parametrize("tune", ["head", "all"])
def test_an_update_that_fails_leaves_the_tuned_network(
    tune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = streams(num_experiences=4).train_stream
    whole, broken = (make_strategy([KeepFirst(batch_size_mem=4, tune=tune)]) for _ in range(2))
    for strategy in (whole, broken):
        for number in (0, 1):
            train(strategy, stream[number : number + 1], seed=number)
    tuned = weights(broken)

    def update(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(broken.plugins[0].store, "update", update)
        train(broken, stream[2:3], seed=2)
    assert weights(broken).equal(tuned)
    for strategy in (whole, broken):
        train(strategy, stream[2:3], seed=2)
    assert weights(broken).equal(weights(whole))


class BodyNoted(SupervisedPlugin[Any]):
    """Notes the first layer's weights that an experience begins with."""

    weight: Tensor

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if not hasattr(self, "weight"):
            self.weight = strategy.model.body[1].weight.detach().clone()


class Begun(SupervisedPlugin[Any]):
    """Notes the weights that an experience begins with."""

    def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if not hasattr(self, "first"):
            self.first = weights(strategy)
        self.weights = weights(strategy)


@pytest.mark.parametrize("tune", ["head", "all"])
def test_the_next_experience_goes_on_from_the_network_before_the_tuning(tune: Any) -> None:
    found = []
    for how in ("none", tune):
        begun = Begun()  # type: ignore[no-untyped-call]
        strategy = make_strategy([KeepFirst(batch_size_mem=4, tune=how), begun])
        train(strategy, streams(num_experiences=4).train_stream)
        found.append((begun.weights, weights(strategy)))
    assert found[0][0].equal(found[1][0])
    assert not found[0][1].equal(found[1][1])


@pytest.mark.parametrize("which", ["another network", "a changed one"])
def test_a_network_that_was_not_tuned_goes_on_as_it_is(which: str) -> None:
    stream = streams(num_experiences=4).train_stream
    begun = Begun()  # type: ignore[no-untyped-call]
    replay = KeepFirst(batch_size_mem=4, tune="all")
    strategy = make_strategy([replay])
    train(strategy, stream[:2])
    if which == "another network":
        strategy = make_strategy([replay, begun], model=make_model())
        expected = weights(strategy)
        train(strategy, stream[2:3])
        assert replay.distill_used == 0  # it has learned no old class
        train(strategy, stream[3:4])
        assert replay.distill_used == 1
    else:
        with torch.no_grad():
            for parameter in strategy.model.parameters():
                parameter.mul_(0.5)
        expected = weights(strategy)
        strategy.plugins.append(begun)
        with pytest.warns(HMNReplayWarning, match="changed after it was tuned, and goes on as it"):
            train(strategy, stream[2:3])
        assert replay.distill_used == 1
    assert begun.first.equal(expected)


def test_a_state_knows_which_updates_another_network_has_learned() -> None:
    stream = streams(num_experiences=4).train_stream
    replay = KeepFirst(batch_size_mem=4)
    train(make_strategy([replay]), stream[:2])
    strategy = make_strategy([replay], model=make_model())
    strategy.plugins[0].before_training(strategy)  # such as a run that was stopped there
    again = KeepFirst(batch_size_mem=4)
    again.load_state_dict(replay.state_dict())
    train(make_strategy([again], model=make_model()), stream[2:3])
    assert again.distill_used == 0


def test_a_state_has_the_weights_before_the_tuning() -> None:
    stream = streams(num_experiences=4).train_stream
    whole = learn(stream[:2], tune="all")
    state = whole.plugins[0].state_dict()
    replay = KeepFirst(batch_size_mem=4, tune="all")
    replay.load_state_dict(state)
    resumed = make_strategy([replay], model=copy.deepcopy(whole.model))
    found = []
    for strategy in (whole, resumed):
        begun = Begun()  # type: ignore[no-untyped-call]
        strategy.plugins.append(begun)
        train(strategy, stream[2:3])
        found.append(begun.weights)
    assert found[0].equal(found[1])
    kept = state["untuned_weights"]
    name = next(iter(kept))
    with pytest.raises(CheckpointError, match="its network was altered"):
        replay.load_state_dict({**state, "untuned_weights": {**kept, name: kept[name] + 1}})


def test_what_cannot_be_tuned_is_refused() -> None:
    pieces = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    with pytest.raises(ConfigError, match="in pieces: leave tune out"):
        learn(pieces, tune="all")
    with pytest.raises(ConfigError, match="tune is for one head"):
        learn(streams("nc_tasks").train_stream, tune="all", loss="plain")
    with pytest.raises(ConfigError, match=r"Sequential has no nn\.Linear"):
        learn(tune="head", model=nn.Sequential(nn.Flatten(), nn.Conv1d(1, 1, 1)))
    for options in ({"tune": "tail"}, {"tune_steps": 0}, {"tune_rate": 0.0}):
        with pytest.raises(ConfigError, match="tune is one of none, head, all"):
            KeepFirst(**options)
    with pytest.raises(ConfigError, match="tune is for mode="):
        KeepFirst(tune="all", mode="memory_only")


@pytest.mark.parametrize("options", [{"tune": "all"}, {"labels": "soft"}])
def test_a_head_for_each_task_is_refused_before_the_first_step(options: Any) -> None:
    model = MTSimpleMLP(input_size=192)
    strategy = make_strategy([KeepFirst(loss="plain", **options)], model=model)
    with pytest.raises(ConfigError, match="is for one head, and MTSimpleMLP has one for each task"):
        train(strategy, streams("nc_tasks").train_stream[:1])


def test_a_network_of_heads_is_distilled_where_there_is_one_task() -> None:
    replay = KeepFirst(distill=1.0)
    train(make_strategy([replay], model=MTSimpleMLP(input_size=192)), streams().train_stream)
    assert replay.distill_used == 1


@pytest.mark.parametrize("options", [{"tune": "head"}, {"loss": "grouped"}])
def test_a_head_that_is_not_found_is_said_before_the_first_step(options: Any) -> None:
    class Scaled(HeadFirst):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) / 0.5

    strategy = make_strategy([KeepFirst(**options)], model=Scaled())
    before = weights(strategy)
    with pytest.raises(ConfigError, match="of Scaled makes its logits"):
        train(strategy, streams().train_stream[:1])
    assert weights(strategy).equal(before)


def test_a_head_that_has_grown_since_is_no_other_network() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
            self.head = IncrementalClassifier(16, 2)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(images))
            return logits

    benchmark = streams(num_experiences=4)
    replay = KeepFirst(batch_size_mem=4, tune="all")
    strategy = make_strategy([replay], model=Growing())
    for experience in benchmark.train_stream[:2]:
        train(strategy, [experience])
    untuned = replay.state_dict()["untuned_weights"]["body.1.weight"]
    strategy.eval(benchmark.test_stream)  # the head grows for classes to come
    assert not strategy.model.body[1].weight.equal(untuned)
    noted = BodyNoted()  # type: ignore[no-untyped-call]
    strategy.plugins.append(noted)
    train(strategy, benchmark.train_stream[2:3])
    assert noted.weight.equal(untuned)


def test_the_weights_before_the_tuning_can_be_had() -> None:
    seen: list[Tensor] = []

    class Note(SupervisedPlugin[Any]):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            seen.append(weights(strategy))

    replay = KeepFirst(batch_size_mem=4, tune="all")
    strategy = make_strategy([Note(), replay])  # type: ignore[no-untyped-call]
    for experience in streams().train_stream:
        train(strategy, [experience])
        tuned = weights(strategy)
        with pytest.raises(KeyError), replay.untuned(strategy.model):
            assert weights(strategy).equal(seen[-1])
            raise KeyError
        assert weights(strategy).equal(tuned)
    assert not tuned.equal(seen[-1])

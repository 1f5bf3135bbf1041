"""The replay losses: against the formulas computed by hand, and which one is used where."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import MTSimpleMLP
from avalanche.training.plugins.lwf import LwFPlugin
from avalanche.training.supervised.er_ace import ER_ACE
from torch import Tensor, nn

from hmn_replay.avalanche.losses import LOSSES, Loss, ReplayStep
from hmn_replay.errors import ConfigError, HMNReplayWarning
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

CURRENT, REPLAYED = torch.tensor([2, 3, 2, 2]), torch.tensor([0, 1])


def make_step(
    criterion: nn.Module | None = None, weight: float | None = None, **changes: Any
) -> ReplayStep:
    """Make a step of four current images of classes 2 and 3, and two of classes 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, requires_grad=True)
    step: dict[str, Any] = {
        "logits": logits,
        "head_logits": torch.randn(6, 5, generator=generator, requires_grad=True),
        "labels": torch.cat([CURRENT, REPLAYED]),
        "num_replayed": 2,
        "criterion": criterion or nn.CrossEntropyLoss(),
        "replay_weight": weight,
        "current_counts": torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0]),
        "memory_counts": torch.tensor([6.0, 2.0, 0.0, 0.0, 0.0]),
        "strategy": None,
    }
    return ReplayStep(**{**step, **changes})


def by_hand(step: ReplayStep, name: str) -> float:
    """Compute a loss image by image, in Python's numbers."""
    criterion: Any = step.criterion
    class_weights = [1.0] * 5 if criterion.weight is None else criterion.weight.tolist()
    shares = [0.0] * 5
    share = 2 / 6 if step.replay_weight is None else step.replay_weight
    for label, (own, old) in enumerate(
        zip(step.current_counts.tolist(), step.memory_counts.tolist(), strict=True)
    ):
        shares[label] = (1 - share) * own / 4 + share * old / 8
    least = min(value for value in shares if value)
    losses, weighted, of_head = [], [], [0.0]
    for position, label in enumerate(step.labels.tolist()):
        row = step.logits[position].tolist()
        left_out: set[int] = set()
        if name == "balanced":
            row = [z + math.log(max(p, least)) for z, p in zip(row, shares, strict=True)]
        elif name == "asymmetric" and position < 4:
            left_out = {0, 1}
        elif name in ("separated", "grouped"):
            counts = step.current_counts if position < 4 else step.memory_counts
            lowest = min(count for count in counts.tolist() if count)
            prior = [max(count, lowest) / float(counts.sum()) for count in counts.tolist()]
            row = [z + math.log(p) for z, p in zip(row, prior, strict=True)]
            left_out = {0, 1, 4} if position < 4 else {2, 3} if name == "grouped" else set()
        total = sum(math.exp(z) for label, z in enumerate(row) if label not in left_out)
        losses.append(class_weights[label] * (math.log(total) - row[label]))
        weighted.append(class_weights[label])
        if name == "grouped" and position >= 4:
            assert step.head_logits is not None
            row = step.head_logits[position].tolist()
            row = [z + math.log(p) for z, p in zip(row, prior, strict=True)]
            total = sum(map(math.exp, row))
            of_head.append(class_weights[label] * (math.log(total) - row[label]))
    is_sum = criterion.reduction == "sum"
    head = sum(of_head) * (3 * share if is_sum else share / sum(weighted[4:]))
    if step.replay_weight is None:
        return head + float(sum(losses) if is_sum else sum(losses) / sum(weighted))
    current = sum(losses[:4]) / (4 if is_sum else sum(weighted[:4]))
    replayed = sum(losses[4:]) / (2 if is_sum else sum(weighted[4:]))
    return head + float((6 if is_sum else 1) * ((1 - share) * current + share * replayed))


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("weight", [None, 0.75])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("class_weights", [None, [1.0, 5.0, 0.5, 2.0, 1.0]])
def test_a_loss_is_that_of_its_formula(
    name: str, weight: float | None, reduction: str, class_weights: list[float] | None
) -> None:
    given = None if class_weights is None else torch.tensor(class_weights)
    changes: dict[str, Any] = {}
    if name in ("separated", "grouped"):
        changes = {"memory_counts": torch.tensor([6.0, 2.0, 3.0, 5.0, 0.0])}
    step = make_step(nn.CrossEntropyLoss(weight=given, reduction=reduction), weight, **changes)
    loss = LOSSES[name](step)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(by_hand(step, name), rel=1e-5)
    loss.backward()
    assert step.logits.grad is not None and bool(step.logits.grad.isfinite().all())


def test_a_weight_that_is_the_share_by_number_changes_nothing() -> None:
    for reduction in ("mean", "sum"):
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        for loss in LOSSES.values():
            expected = loss(make_step(criterion))
            assert torch.allclose(loss(make_step(criterion, weight=2 / 6)), expected)


def test_separated_takes_images_of_other_classes_among_the_current_ones() -> None:
    # As where ReplayPlugin of Avalanche puts old images into the experience's data.
    step = make_step(current_counts=torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0]))
    loss = LOSSES["separated"](step)
    assert 0 < loss.item() < 100


def test_separated_current_images_leave_old_classes_alone() -> None:
    step = make_step()
    only_current = LOSSES["separated"](
        dataclasses.replace(step, replay_weight=0.0, memory_counts=torch.ones(5))
    )
    (gradient,) = torch.autograd.grad(only_current, step.logits)
    assert not gradient[:, [0, 1, 4]].any() and gradient[:4, [2, 3]].all()


def test_grouped_lets_the_head_alone_tell_old_classes_from_current_ones() -> None:
    step = make_step(memory_counts=torch.tensor([6.0, 2.0, 3.0, 5.0, 0.0]))
    assert step.head_logits is not None
    of_logits, of_head = torch.autograd.grad(
        LOSSES["grouped"](step), [step.logits, step.head_logits]
    )
    assert not of_logits[:4, [0, 1, 4]].any() and of_logits[:4, [2, 3]].all()
    assert not of_logits[4:, [2, 3]].any() and of_logits[4:, [0, 1]].all()
    assert not of_head[:4].any() and of_head[4:].all()


def test_the_heads_logits_are_those_of_the_step_without_a_graph_to_features() -> None:
    seen: list[bool] = []

    def look(step: ReplayStep) -> Tensor:
        assert step.head_logits is not None
        head = step.strategy.model[-1]
        features = step.strategy.model[:-1]
        assert step.head_logits.allclose(step.logits)
        own = torch.autograd.grad(step.head_logits.sum(), head.weight, retain_graph=True)
        assert own[0].any()
        rest = torch.autograd.grad(
            step.head_logits.sum(), features[1].weight, retain_graph=True, allow_unused=True
        )
        seen.append(rest[0] is None)
        return step.loss_of(step.logits)

    look.needs_head = True  # type: ignore[attr-defined]
    found, replay = trained(look)
    assert seen and all(seen)
    assert found.equal(trained("plain")[0])
    assert not trained("grouped")[0].equal(trained("separated")[0])
    assert not replay._head


class Interrupt(SupervisedPlugin[Any]):
    """Stops a training in its second experience, once."""

    is_on = True

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.is_on and strategy.clock.train_exp_counter:
            self.is_on = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("loss", ["separated", "grouped"])
def test_a_copy_of_the_network_takes_no_hook_along(loss: Loss) -> None:
    """Of a training that was interrupted, too, which the strategy can then go on from."""
    lwf, replay = LwFPlugin(), KeepFirst(loss=loss, distill=1.0)
    strategy = make_strategy([lwf, replay, Interrupt()])  # type: ignore[no-untyped-call]
    first, second = streams().train_stream
    train(strategy, [first])
    with pytest.raises(KeyboardInterrupt):
        strategy.train(second)
    assert replay._teacher is not None
    copied = copy.deepcopy(strategy.model)
    shown = replay._teacher._shown
    copied(torch.rand(2, 3, 8, 8))
    assert replay._teacher._shown is shown
    assert len(pickle.dumps(copied)) < 2 * len(pickle.dumps(copied.state_dict()))
    strategy.train(second)
    assert not any(module._forward_pre_hooks for module in strategy.model.modules())


def test_a_network_without_a_head_is_refused_before_training() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Conv1d(1, 1, 1))
    with pytest.raises(ConfigError, match=r"Sequential has no nn\.Linear"):
        trained("grouped", model=model)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Unflatten(1, (6, 1)), nn.MaxPool1d(1))
    model.append(nn.Flatten()).append(nn.Hardtanh())
    model.append(nn.Unflatten(1, (1, 6))).append(nn.MaxPool1d(6)).append(nn.Flatten())
    model.append(nn.ConstantPad1d((0, 3), 0.0))
    with pytest.raises(
        ConfigError, match=r"none of the 1 linear layers of Sequential makes its logits"
    ):
        trained("grouped", model=model)


class Compare(SupervisedPlugin[Any]):
    """Notes the loss of each step, and what a function expects of it."""

    def __init__(self, replay: KeepFirst, expected: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replay, self.expected = replay, expected
        self.losses: list[tuple[float, float]] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.loss = strategy.loss + 1.0

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        expected = strategy._criterion(strategy.mb_output, strategy.mb_y)
        if n := self.replay.last_replay_size:
            expected = self.expected(strategy, n)
        self.losses.append((strategy.loss.item(), 1 + expected.item()))


def test_the_previous_network_is_distilled_on_what_the_network_sees() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Distilled(SupervisedPlugin[Any]):
        shown: Tensor

        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.previous = copy.deepcopy(strategy.model).eval()
            self.hook = strategy.model.register_forward_pre_hook(
                lambda model, inputs: setattr(self, "shown", inputs[0])
            )

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            self.hook.remove()

        def after_backward(self, strategy: Any, **kwargs: Any) -> None:
            logits, labels = strategy.mb_output, strategy.mb_y
            expected = strategy._criterion(logits, labels)
            if strategy.clock.train_exp_counter:
                with torch.no_grad():
                    teacher = self.previous(self.shown)
                target, own = (rows[:, :2].div(2).softmax(1) for rows in (teacher, logits))
                expected = expected + 0.5 * 4 * (target * (target / own).log()).sum(1).mean()
            seen.append((strategy.loss.detach(), expected.detach()))

    replay = KeepFirst(loss="plain", renew="before", distill=0.5)
    strategy = make_strategy([replay, Distilled()])  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)

    def augment(model: nn.Module, inputs: tuple[Tensor]) -> Tensor | None:
        if not model.training:
            return None
        return inputs[0] + 0.1 * torch.rand(inputs[0].shape, generator=generator)

    strategy.model.register_forward_pre_hook(augment)
    train(strategy, streams().train_stream)
    assert len(seen) == 6
    assert all(torch.allclose(loss, expected) for loss, expected in seen)
    assert len(strategy.model._forward_pre_hooks) == 1


def test_where_there_is_no_previous_network_distillation_is_refused() -> None:
    online = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    with pytest.raises(ConfigError, match="in pieces: leave distill out"):
        train(make_strategy([KeepFirst(distill=1.0)]), online)
    with pytest.raises(ConfigError, match="without task labels above 0"):
        trained("plain", kind="nc_tasks", distill=1.0)
    replay = KeepFirst(distill=1.0, loss="plain")
    strategy = make_strategy([replay], ER_ACE, mem_size=8, batch_size_mem=4)
    with pytest.raises(ConfigError, match="distill is not for ER_ACE"):
        train(strategy, streams().train_stream)
    assert not replay.report
    for options in ({"distill": -1.0}, {"distill": 1.0, "mode": "memory_only"}):
        with pytest.raises(ConfigError, match="distill"):
            KeepFirst(**options)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [("auto", 1), ("separated", 1), ("grouped", 1), ("balanced", 0), ("plain", 0)],
)
def test_by_default_losses_that_learn_new_classes_from_decoded_images_distill(
    loss: str, weight: int
) -> None:
    found, replay = trained(loss, distill=None)
    assert replay.distill_used == weight
    assert torch.equal(found, trained(loss, distill=weight)[0])
    assert not torch.equal(found, trained(loss, distill=1 - weight)[0])


def test_adaptive_distillation_grows_with_the_old_classes() -> None:
    replay, used = KeepFirst(loss="plain", renew="before", distill="adaptive"), []
    strategy = make_strategy([replay])
    for experience in labelled_streams((0, 1), (2,), (3,)).train_stream:
        strategy.train(experience)
        used.append(replay.distill_used)
    assert used == [0.0, math.sqrt(2 / 1), math.sqrt(3 / 1)]


def test_adaptive_distillation_is_of_what_was_learned() -> None:
    stream = labelled_streams((0, 1), (2,), (3,)).train_stream
    first = KeepFirst()
    train(make_strategy([first]), stream[:1])
    replay = KeepFirst(distill="adaptive")
    replay.memory = first.memory  # beside a network of which nothing is known
    strategy, used = make_strategy([replay]), []
    for experience in stream[1:]:
        strategy.train(experience)
        used.append(replay.distill_used)
    assert used == [0.0, math.sqrt(3 / 1)]


def test_by_default_nothing_is_distilled_where_it_cannot_be() -> None:
    def of_decoded_images(step: ReplayStep) -> Tensor:
        return step.loss_of(step.logits)

    of_decoded_images.needs_all_classes = True  # type: ignore[attr-defined]
    online = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    with_tasks = streams("nc_tasks").train_stream
    options: list[tuple[Any, dict[str, Any]]] = [
        (online, {}),
        (with_tasks, {}),
        (with_tasks, {"loss": of_decoded_images}),
        (streams().train_stream, {"mode": "memory_only"}),
    ]
    for stream, given in options:
        replay = KeepFirst(**given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HMNReplayWarning)
            train(make_strategy([replay]), stream)
        assert replay.distill_used == 0 and replay.report
    replay = KeepFirst(loss=of_decoded_images)
    train(make_strategy([replay]), streams().train_stream)
    assert replay.distill_used == 1


def test_by_default_only_what_was_learned_is_distilled() -> None:
    stream = labelled_streams((0, 1), (2,), (3, 0)).train_stream
    first = KeepFirst()
    train(make_strategy([first]), stream[:1])
    used: list[tuple[float, list[int]]] = []

    class Note(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            teacher = replay._teacher
            classes = [] if teacher is None else teacher.classes.tolist()
            used.append((replay.distill_used, classes))

    # A memory that was loaded, beside a network of which nothing is known.
    replay = KeepFirst()
    replay.memory = first.memory
    strategy = make_strategy([replay, Note()])  # type: ignore[no-untyped-call]
    strategy.train(stream[1])
    strategy.train(stream[2])
    # The last experience brings class 0 again.
    assert used == [(0.0, []), (1.0, [1, 2])]


@pytest.mark.parametrize(("renew", "loss"), [("before", "auto"), ("after", "balanced")])
def test_classes_that_come_again_are_not_distilled(renew: Any, loss: str) -> None:
    used: list[list[int]] = []

    class Note(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            teacher = replay._teacher
            used.append([] if teacher is None else teacher.classes.tolist())

    replay = KeepFirst(distill=1.0, renew=renew, loss=loss)
    strategy = make_strategy([replay, Note()])  # type: ignore[no-untyped-call]
    for experience in labelled_streams((0, 1), (2, 3), (0, 2)).train_stream:
        strategy.train(experience)
    assert used == [[], [0, 1], [1, 3]]


def test_a_network_that_cannot_be_copied_is_not_distilled() -> None:
    class Alone(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("only one of this")

    def run(**options: Any) -> KeepFirst:
        replay = KeepFirst(**options)
        model = nn.Sequential(nn.Flatten(), Alone(192, 4))
        train(make_strategy([replay], model=model), streams().train_stream)
        return replay

    with pytest.warns(HMNReplayWarning, match="Sequential cannot be copied.*only one of this"):
        assert run().distill_used == 0
    assert run(distill=0.0).distill_used == 0
    with pytest.raises(ConfigError, match="pass distill=0"):
        run(distill=1.0)


def test_the_previous_network_is_compiled_where_the_network_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def compiled(function: Any, **options: Any) -> Any:
        module = function.__self__

        def call(*inputs: Any, **named: Any) -> Any:
            calls.append("training" if module.training else "evaluation")
            return function(*inputs, **named)

        return call

    monkeypatch.setattr(torch, "compile", compiled)

    def steps(model: nn.Module) -> int:
        """Return how many more calls in evaluation mode distillation makes."""
        counts = []
        for weight in (0.0, 1.0):
            calls.clear()
            train(make_strategy([KeepFirst(distill=weight)], model=model), streams().train_stream)
            counts.append(calls.count("evaluation"))
        assert "training" in calls
        return counts[1] - counts[0]

    inner = make_model()
    inner.compile()
    assert steps(inner) > 0
    assert steps(nn.Sequential(inner)) > 0


def test_the_previous_network_shares_what_does_not_learn() -> None:
    model = make_model()
    frozen = next(model.parameters()).requires_grad_(False)
    shared: list[bool] = []

    class Note(SupervisedPlugin[Any]):
        def before_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            if replay._teacher is not None:
                own = list(replay._teacher.network.parameters())
                shared.extend(each is frozen for each in own)

    replay = KeepFirst()
    strategy = make_strategy([replay, Note()], model=model)  # type: ignore[no-untyped-call]
    train(strategy, streams().train_stream)
    assert shared == [True, *[False] * (len(list(model.parameters())) - 1)]


def test_what_other_plugins_add_to_the_loss_stays() -> None:
    def expected(strategy: Any, n: int) -> Tensor:
        current = strategy._criterion(strategy.mb_output[:-n], strategy.mb_y[:-n])
        replayed = strategy._criterion(strategy.mb_output[-n:], strategy.mb_y[-n:])
        loss: Tensor = 0.25 * current + 0.75 * replayed
        return loss

    replay = KeepFirst(batch_size_mem=3, replay_weight=0.75, loss="plain")
    compare = Compare(replay, expected)
    train(make_strategy([compare, replay]), streams().train_stream)
    assert len(compare.losses) == 6
    for loss, wanted in compare.losses:
        assert loss == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["nc", "online"])
def test_the_shares_are_those_of_the_memory_and_of_the_experience_so_far(kind: str) -> None:
    gathered: list[int] = []
    seen: list[int] = []

    class Gather(SupervisedPlugin[Any]):
        def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            if kind == "online":
                if strategy.experience.is_first_subexp:
                    gathered.clear()
                gathered.extend(label for _, label, *_ in strategy.experience.dataset)
            seen[:] = gathered

    def expected(strategy: Any, n: int) -> Tensor:
        outputs, labels = strategy.mb_output, strategy.mb_y
        seen.extend(labels[:-n].tolist())
        kept, share = replay.memory.decode(dtype=torch.uint8)[1].tolist(), n / len(labels)
        prior = [
            (1 - share) * seen.count(label) / len(seen) + share * kept.count(label) / len(kept)
            for label in range(outputs.shape[1])
        ]
        least = min(value for value in prior if value > 0)
        shift = torch.tensor([math.log(max(p, least)) for p in prior])
        return nn.functional.cross_entropy(outputs + shift, labels)

    replay = KeepFirst(batch_size_mem=3, renew="after")
    compare = Compare(replay, expected)
    stream = streams().train_stream
    if kind == "online":
        stream = in_pieces(stream, 5, access_task_boundaries=True)
    train(make_strategy([Gather(), compare, replay]), stream)  # type: ignore[no-untyped-call]
    assert len(compare.losses) == (8 if kind == "online" else 6)
    for value, wanted in compare.losses:
        assert value == pytest.approx(wanted, rel=1e-4)
    assert replay.loss_used == "balanced"


def trained(
    loss: Any, kind: str = "nc", renew: Any = "auto", distill: float | None = 0.0, **options: Any
) -> tuple[Tensor, KeepFirst]:
    replay = KeepFirst(batch_size_mem=3, loss=loss, renew=renew, distill=distill)
    strategy = make_strategy([replay], **options)
    train(strategy, streams(kind).train_stream)
    return weights(strategy), replay


SMOOTH = nn.CrossEntropyLoss(label_smoothing=0.1)


@pytest.mark.parametrize(
    ("options", "used", "reason"),
    [
        ({"criterion": SMOOTH}, "plain", "without label smoothing, but CrossEntropyLoss"),
        ({"criterion": nn.MultiMarginLoss()}, "plain", "but MultiMarginLoss"),
        ({"kind": "nc_tasks"}, "plain", "task labels above 0"),
        ({"strategy": ER_ACE, "mem_size": 8, "batch_size_mem": 4}, "ER_ACE", "ER_ACE has a loss"),
    ],
    ids=["smoothing", "margin", "tasks", "own"],
)
def test_auto_is_plain_where_it_has_to_be_and_warns_once(
    options: dict[str, Any], used: str, reason: str
) -> None:
    def run(loss: str) -> Tensor:
        given = dict(options)
        kind, strategy = given.pop("kind", "nc"), given.pop("strategy", None)
        if strategy:
            given["kind"] = strategy
        replay = KeepFirst(batch_size_mem=3, loss=loss, renew="after")
        learner = make_strategy([replay], **given)
        train(learner, streams(kind).train_stream)
        assert replay.loss_used == used
        assert {entry["loss_used"] for entry in replay.report[1:]} == {used}
        return weights(learner)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run("auto")
    (warned,) = (str(each.message) for each in caught if "plain loss" in str(each.message))
    assert reason in warned
    assert torch.equal(found, run("plain"))


@pytest.mark.parametrize(("renew", "loss"), [("before", "separated"), ("after", "balanced")])
def test_auto_is_the_best_loss_that_can_be(renew: str, loss: str) -> None:
    auto, replay = trained("auto", renew=renew)
    assert (replay.loss_used, replay.renew_used) == (loss, renew)
    assert torch.equal(auto, trained(loss, renew=renew)[0])
    assert not torch.equal(auto, trained("plain", renew=renew)[0])


def test_a_loss_that_was_asked_for_and_cannot_be_had_is_refused() -> None:
    for loss in ("balanced", "separated", "grouped", "asymmetric"):
        with pytest.raises(ConfigError, match="without label smoothing"):
            trained(loss, criterion=SMOOTH)
    for options in ({"loss": "balanced"}, {"replay_weight": 0.5}):
        strategy = make_strategy([KeepFirst(**options)], ER_ACE, mem_size=8, batch_size_mem=4)
        with pytest.raises(ConfigError, match="ER_ACE has a loss of its own"):
            strategy.train(streams().train_stream[0])
    given: list[dict[str, Any]] = [{"loss": "asymmetric"}, {"loss": "separated"}]
    for options in (*given, {"replay_weight": 0.5}, {"renew": "before"}):
        with pytest.raises(ConfigError, match="memory_only"):
            KeepFirst(mode="memory_only", **options)
    with pytest.raises(ConfigError, match="loss='separated' learns the current classes"):
        KeepFirst(loss="separated", renew="after")


def test_task_labels_leave_nothing_to_balance() -> None:
    for loss in ("balanced", "asymmetric"):
        with pytest.raises(ConfigError, match=f"loss='{loss}' .* task labels above 0 .*: leave it"):
            trained(loss, kind="nc_tasks")


def test_a_network_of_heads_is_trained_alike_from_the_first_task_on() -> None:
    def heads() -> nn.Module:
        torch.manual_seed(0)
        return MTSimpleMLP(input_size=192)

    with pytest.warns(HMNReplayWarning, match="task labels above 0"):
        found, replay = trained("auto", kind="nc_tasks", model=heads(), distill=None)
    assert {(r["loss_used"], r["renew_used"]) for r in replay.report} == {("plain", "after")}
    assert torch.equal(found, trained("plain", kind="nc_tasks", model=heads())[0])
    for options in ({"loss": "separated"}, {"loss": "plain", "distill": 1.0}):
        model = heads()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ConfigError, match="leave it out"):
            trained(kind="nc_tasks", model=model, **options)
        assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def registered() -> Iterator[str]:
    @LOSSES.register("replayed-alone")
    def replayed_alone(step: ReplayStep) -> Tensor:
        return step.criterion(step.logits[step.num_current :], step.labels[step.num_current :])

    yield "replayed-alone"
    LOSSES.remove("replayed-alone")


def test_a_loss_from_outside_is_used_by_name_and_as_a_callable(registered: str) -> None:
    by_name, replay = trained(registered)
    as_callable, other = trained(LOSSES[registered])
    assert torch.equal(by_name, as_callable)
    assert (replay.loss_used, other.loss_used) == (registered, "replayed_alone")
    assert replay.report[-1]["loss_used"] == registered
    assert not torch.equal(by_name, trained("plain")[0])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda step: 3.0, "loss returns a scalar tensor; <lambda> returned 3.0"),
        (lambda step: step.logits.sum(1), r"<lambda> returned shape \(\d+,\)"),
        (lambda step: step.logits.detach().sum(), "does not depend on the logits by any graph"),
        (lambda: 0, r"loss is called with \(step\)"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(loss)


def test_a_step_gives_a_loss_the_network_and_the_images() -> None:
    def distilled(step: ReplayStep) -> Tensor:
        again = step.strategy.model(step.strategy.mb_x)
        assert torch.equal(again, step.logits)
        loss: Tensor = step.loss_of(step.logits) + 0 * again.sum()
        return loss

    assert torch.equal(trained(distilled)[0], trained("plain")[0])

"""Soft labels in a stream: what the strategy's own network says, and how it is learned again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from avalanche.training.supervised.er_ace import ER_ACE
from torch import Tensor, nn
from torchvision import transforms

from hmn_replay.avalanche.kinds import HMNReplay, JPEGReplay, RawReplay
from hmn_replay.avalanche.losses import label_distillation
from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.errors import ConfigError
from hmn_replay.replay import ReplayMemory
from tests.streams import (
    Images,
    in_pieces,
    labelled_streams,
    make_model,
    make_strategy,
    streams,
    train,
    weights,
)
from tests.support import TINY


def replay(budget: int = 9_000, **options: Any) -> RawReplay:
    return RawReplay(budget, labels="soft", batch_size_mem=4, **options)


def learn(plugin: MemoryReplay, benchmark: Any = None, count: int = 2, **options: Any) -> Any:
    strategy = make_strategy([plugin], train_epochs=2, **options)
    train(strategy, list((benchmark or streams()).train_stream)[:count])
    return strategy


def by_hand(logits: Tensor, rows: Tensor, classes: list[int]) -> float:
    """Return the divergence at temperature 2, image by image, over the known classes."""
    total = 0.0
    for answer, row in zip(logits.double(), rows.double(), strict=True):
        known = [i for i, p in enumerate(row.tolist()) if p > 0]
        student = torch.stack([answer[classes[i]] for i in known]) / 2
        target = row[known].log() / 2
        p, q = target.softmax(0), student.softmax(0)
        total += 4 * float((p * (p.log() - q.log())).sum())
    return total


def test_a_label_speaks_of_the_classes_that_it_knows() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = torch.tensor(
        [[0.7, 0.2, 0.1, 0.0], [0.0, 0.5, 0.5, 0.0], [0, 0, 1.0, 0], [0.25, 0.25, 0.25, 0.25]]
    )
    classes = [3, 0, 5, 2]
    term = label_distillation(logits, rows, torch.tensor(classes))
    assert term.item() == pytest.approx(by_hand(logits.detach(), rows, classes), rel=1e-5)
    (gradient,) = torch.autograd.grad(term, logits)
    assert gradient.isfinite().all()
    assert not gradient[:, [1, 4]].any(), "no label speaks of these"
    assert not gradient[2].any(), "a hard label"
    assert not gradient[1, 3], "a class that came later"
    assert gradient[0, 3] != 0


@pytest.mark.parametrize("renew", ["before", "after"])
def test_the_network_labels_what_it_has_learned(renew: Any) -> None:
    plugin = replay(renew=renew)
    strategy = learn(plugin, count=1)
    memory = plugin.memory
    assert memory is not None
    assert memory.has_soft_labels
    said = memory.soft_labels()
    strategy.model.eval()
    with torch.no_grad():
        answers = strategy.model(memory.decode()[0])[:, memory.classes].softmax(dim=1)
    # Levels are steps of 0.75, and the labels a mean over augmentations.
    assert float((said - answers).abs().mean()) < 0.15
    assert float(said.max()) < 0.999
    for experience in list(streams().train_stream)[1:]:
        strategy.train(experience)
    assert plugin.memory is not None
    after = plugin.memory.soft_labels()
    old = plugin.memory.labels < 2
    assert not after[old][:, 2:].any(), "they did not know the new classes"
    assert bool(plugin.memory.is_soft.all())
    count = plugin.memory.images_per_class[0]
    assert after[plugin.memory.labels == 0][:, :2].equal(said[memory.labels == 0][:count])
    assert plugin.memory.file_bytes <= 9_000
    assert plugin.report[-1]["file_bytes"] == plugin.memory.file_bytes
    assert plugin.report[-1]["num_images"] == len(plugin.memory)


def test_images_that_have_a_left_and_a_right_are_labelled_without_mirroring() -> None:
    images = torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    images[:4, ..., :4] = images[4:, ..., 4:] = 200  # bright on the left, and on the right

    def network(shown: Tensor) -> Tensor:
        left, right = shown[..., :4].mean(dim=(1, 2, 3)), shown[..., 4:].mean(dim=(1, 2, 3))
        return 20 * torch.stack([left, right], dim=1)

    own: dict[tuple[str, ...], Tensor] = {}
    for names in (("flip", "crop"), ("crop",)):
        memory = ReplayMemory(9000, "raw", device="cpu")
        memory.update(images, torch.arange(8) // 4)
        assert memory.label(network, views=8, augmentations=names) == 8
        assert memory.memory is not None
        own[names] = memory.memory.soft_labels()[torch.arange(8), memory.memory.class_index]
    assert float(own["crop",].min()) > 0.95
    assert float(own["flip", "crop"].mean()) < 0.8


@pytest.mark.parametrize(("names", "used"), [("crop, flip", ("crop", "flip")), ((), ())])
def test_the_strategys_network_is_shown_the_augmentations_that_were_asked_for(
    names: Any, used: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin, label = replay(label_augmentations=names), ReplayMemory.label
    given: list[Any] = []

    def note(self: ReplayMemory, network: Any, **options: Any) -> int:
        given.append(options["augmentations"])
        return label(self, network, **options)

    monkeypatch.setattr(ReplayMemory, "label", note)
    learn(plugin, count=1)
    assert given == [used] and plugin.memory is not None and plugin.memory.has_soft_labels
    with pytest.raises(ConfigError, match="mirror"):
        replay(label_augmentations="mirror")


def test_old_images_are_learned_by_their_soft_labels_too() -> None:
    found = {
        weight: [weights(learn(replay(label_weight=weight), count=n)) for n in (1, 2)]
        for weight in (0.0, 1.0)
    }
    hard = weights(learn(RawReplay(9_000, batch_size_mem=4), count=1))
    assert found[0.0][0].equal(found[1.0][0]), "in the first experience, nothing is said yet"
    assert found[0.0][0].equal(hard)
    assert not found[0.0][1].equal(found[1.0][1])


def test_the_term_is_a_mean_over_the_mini_batch() -> None:
    """Of one step on a batch of which the memory's images are a part."""
    terms: list[float] = []

    class Looking(RawReplay):
        def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
            before = strategy.loss
            super().before_backward(strategy, *args, **kwargs)
            if self._soft is not None and self.last_replay_size:
                logits = strategy.mb_output.detach()[-self.last_replay_size :]
                classes = plugin.memory.classes.tolist()  # type: ignore[union-attr]
                wanted = by_hand(logits, self._soft, classes) / len(strategy.mb_y)
                terms.append((strategy.loss - before).item() - 0.5 * wanted)

    plugin = Looking(
        9_000, labels="soft", label_weight=0.5, loss="plain", renew="after", batch_size_mem=4
    )
    learn(plugin)
    assert len(terms) > 4
    assert max(map(abs, terms)) < 1e-5


@pytest.mark.parametrize("kind", [HMNReplay, JPEGReplay])
def test_other_memories_are_labelled_within_their_bytes(kind: Any) -> None:
    own = {name: value for name, value in TINY.items() if name not in ("device", "beta_grid")}
    options = {**own, "beta_grid": ()} if kind is HMNReplay else {"quality": 20}
    plugin = kind(6_000, labels="soft", **options)
    learn(plugin)
    memory = plugin.memory
    assert memory is not None
    assert memory.has_soft_labels
    assert memory.file_bytes == len(memory.to_bytes()) <= 6_000


def test_a_state_has_the_labels() -> None:
    plugin, other = replay(), replay()
    learn(plugin, count=1)
    other.load_state_dict(plugin.state_dict())
    assert plugin.memory is not None
    assert other.memory is not None
    assert other.memory.soft_labels().equal(plugin.memory.soft_labels())


def test_pieces_of_an_online_stream_are_labelled_when_they_are_kept() -> None:
    plugin = replay()
    stream = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    strategy = make_strategy([plugin])
    for piece in stream:
        strategy.train(piece)
    plugin.finish()
    assert plugin.memory is not None
    assert plugin.memory.num_classes == 4
    assert bool(plugin.memory.is_soft.all())


def test_a_piece_that_is_trained_on_again_is_gathered_once() -> None:
    stream = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    found = []
    for again in (False, True):
        plugin = replay()
        strategy = make_strategy([plugin])
        pending = []
        for piece in stream:
            for _ in range(1 + again):
                strategy.train(piece)
            pending.append(plugin.num_pending)
        plugin.finish()
        assert plugin.memory is not None
        found.append((pending, plugin.memory.decode()[0], len(plugin.report)))
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert found[0][1].equal(found[1][1])


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConfigError, match="labels must be hard or soft, and label_weight 0 or"):
        RawReplay(9_000, labels="labeller")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="label_weight 0 or more"):
        RawReplay(9_000, label_weight=-1.0)
    with pytest.raises(ConfigError, match='labels are for mode="replay"'):
        RawReplay(9_000, labels="soft", mode="memory_only")
    with pytest.raises(ConfigError, match="is for one head, without task labels above 0"):
        learn(replay(loss="plain"), streams("nc_tasks"), model=make_model(2))
    with pytest.raises(ConfigError, match="not for ER_ACE, which has a loss of its own"):
        learn(replay(loss="plain"), kind=ER_ACE)


def test_labels_need_no_framework() -> None:
    benchmark = labelled_streams([3, 1], [0])
    model: nn.Module = make_model().train()
    store = ReplayMemory(4_000, "raw", device="cpu")
    assert store.label(model) == 0, "there is no memory yet"
    for experience in benchmark.train_stream:
        data = [experience.dataset[i] for i in range(len(experience.dataset))]
        images = torch.stack([item[0] for item in data])
        store.update(images, torch.tensor([item[1] for item in data]))
        assert store.memory is not None
        before = len(store)
        assert store.label(model) > 0
        assert len(store) <= before
        assert store.memory_bytes <= 4_000
        assert store.label(model) == 0
    assert model.training
    images, labels, soft = store.sample_soft(5)
    assert soft is not None
    assert soft.shape == (5, 3)
    memory = store.memory
    assert memory is not None
    for image, label, row in zip(images, labels, soft, strict=True):
        same = (memory.decode()[0] == image).flatten(1).all(dim=1) & (memory.labels == label)
        assert any(row.equal(own) for own in memory.soft_labels()[same])


def test_what_a_loaded_plugin_has_left_is_labelled_by_the_strategys_network() -> None:
    normalise = transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    stream = streams(data=Images(transform=normalise)).train_stream
    whole = replay(loss="balanced", renew="after")
    strategy = make_strategy([whole])
    for piece in list(in_pieces(stream, 5, access_task_boundaries=True))[:-1]:
        strategy.train(piece)
    loaded = replay(loss="balanced", renew="after")
    loaded.load_state_dict(whole.state_dict())
    assert whole.finish() and not whole.finish()
    with pytest.raises(ConfigError, match=r"a plugin that was loaded does not know: .*finish\("):
        loaded.finish()
    assert loaded.num_pending
    assert loaded.finish(strategy)
    assert whole.memory is not None and loaded.memory is not None
    assert bool(whole.memory.is_soft.all())
    assert loaded.memory.to_bytes() == whole.memory.to_bytes()
    assert loaded.report[-1]["loss_used"] == whole.report[-1]["loss_used"] == "balanced"

"""Replay of real images, raw and JPEG: what stays, how full the file is, what is chosen."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor, nn
from torchvision.transforms import Normalize

from hmn_replay import (
    HMNReplay,
    JPEGReplay,
    LabelledImages,
    LearnedKeeper,
    LosslessReplay,
    MemoryReplay,
    RawReplay,
    RealKeeper,
    SubsampledReplay,
)
from hmn_replay.errors import BudgetError, ConfigError, UnknownOptionError
from hmn_replay.memory import (
    JPEGMemory,
    LosslessMemory,
    Memory,
    RawMemory,
    RealMemory,
    SubsampledMemory,
)
from hmn_replay.training.train import TrainingConfig
from tests.streams import (
    FirstKeeper,
    Images,
    in_pieces,
    labelled_streams,
    make_model,
    make_strategy,
    streams,
    train,
    weights,
)
from tests.support import TINY, PosterMemory, registered

BUDGET = 2500
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (RawReplay, {}),
    (JPEGReplay, {"quality": 30}),
    (LosslessReplay, {}),
    (SubsampledReplay, {"factor": 3}),
]
MEMORIES = {
    RawReplay: RawMemory,
    JPEGReplay: JPEGMemory,
    LosslessReplay: LosslessMemory,
    SubsampledReplay: SubsampledMemory,
}


def memory_of(replay: Any) -> RealMemory:
    assert isinstance(replay.memory, RealMemory)
    return replay.memory


def by_class(memory: RealMemory) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for label, payload in zip(memory.labels.tolist(), memory.payloads, strict=True):
        found.setdefault(label, []).append(payload)
    return found


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_images_stay_byte_for_byte_and_the_file_stays_full(make: Any, options: Any) -> None:
    replay = make(BUDGET, **options)
    strategy = make_strategy([replay], model=make_model(6))
    before: dict[int, list[bytes]] = {}
    for experience in labelled_streams((0, 1), (4, 5), (2, 3)).train_stream:
        strategy.train(experience)
        memory = memory_of(replay)
        assert memory.file_bytes == len(memory.to_bytes()) == replay.memory_bytes <= BUDGET
        images = by_class(memory)
        # One image more would not fit, with its length and padding.
        largest = max(len(payload) for own in images.values() for payload in own)
        if memory.num_images < 10 * len(images):
            assert memory.file_bytes > BUDGET - largest - 24
        assert max(memory.images_per_class) - min(memory.images_per_class) <= 1
        for label, own in before.items():
            assert images[label] == own[: len(images[label])]
        before = images
    assert memory.classes.tolist() == [0, 1, 2, 3, 4, 5]
    assert type(memory) is MEMORIES[make]
    assert replay.loss_used == "separated" == replay.report[-1]["loss_used"]


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_the_seed_draws_and_a_class_may_come_again(make: Any, options: Any) -> None:
    def run(seed: int) -> RealMemory:
        replay = make(1500, seed=seed, **options)
        train(make_strategy([replay]), labelled_streams((0, 1), (1, 2)).train_stream)
        return memory_of(replay)

    first = run(0)
    assert first.to_bytes() == run(0).to_bytes() != run(1).to_bytes()
    assert first.classes.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_file(make: Any, options: Any) -> None:
    stream = streams(num_experiences=4).train_stream

    def run(restart: bool) -> bytes:
        replay = make(BUDGET, **options)
        for number, experience in enumerate(stream):
            train(make_strategy([replay]), [experience], seed=number)
            if restart:
                file = io.BytesIO()
                torch.save(replay.state_dict(), file)
                file.seek(0)
                replay = make(BUDGET, **options)
                replay.load_state_dict(torch.load(file, weights_only=True))
        return memory_of(replay).to_bytes()

    assert run(restart=False) == run(restart=True)


@pytest.mark.parametrize(("make", "options"), KINDS)
def test_modes_and_online_streams_are_those_of_all_replay(make: Any, options: Any) -> None:
    replay = make(BUDGET, mode="memory_only", **options)
    train(make_strategy([replay]), streams("ci").train_stream)
    assert memory_of(replay).num_classes == 4 and replay.loss_used == "plain"
    replay = make(BUDGET, batch_size_mem=2, replay_weight=0.5, loss="asymmetric", **options)
    train(
        make_strategy([replay]), in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    )
    assert not replay.finish() and memory_of(replay).num_classes == 4
    assert replay.loss_used == "asymmetric"


def test_the_images_may_be_chosen_by_the_network() -> None:
    models: list[nn.Module] = []

    def darkest(images: LabelledImages, model: nn.Module) -> Tensor:
        models.append(model)
        return images.images.flatten(1).long().sum(1).argsort()

    replay = RawReplay(1300, selection=darkest)
    strategy = make_strategy([replay])
    stream = labelled_streams((0,)).train_stream
    strategy.train(stream[0])
    assert models == [strategy.model]
    kept, _ = memory_of(replay).decode(dtype=torch.uint8)
    assert 0 < len(kept) < 10
    brightness = [int(image.long().sum()) for image in kept]
    every = sorted(int((x * 255).round().sum()) for x, *_ in stream[0].dataset)
    assert brightness == every[: len(kept)]


def test_a_network_that_chooses_takes_images_as_they_come() -> None:
    """Where the benchmark normalises, what is passed normalises for the network."""
    seen: list[tuple[Tensor, Tensor]] = []
    normalise = Normalize(0.3, 0.2)

    def first(images: LabelledImages, model: Any) -> Tensor:
        floats = images.floats(torch.arange(4))
        assert model.network is strategy.model
        seen.append((model(floats), strategy.model(normalise(floats))))
        return torch.arange(len(images))

    strategy = make_strategy([RawReplay(1300, selection=first)])
    train(strategy, streams(data=Images(transform=normalise)).train_stream[:1])
    assert len(seen) == 1 and seen[0][0].equal(seen[0][1])


@pytest.mark.parametrize("selection", ["herding", "k-centre"])
def test_the_images_may_be_chosen_by_name(selection: str) -> None:
    training = TrainingConfig(width=4, num_passes=40)
    replay = RawReplay(1500, selection=selection, training=training)
    train(make_strategy([replay]), streams().train_stream[:1])
    assert memory_of(replay).num_classes == 2


def test_a_quality_is_chosen_on_the_first_experience_and_stays() -> None:
    replay = JPEGReplay(BUDGET, training=TrainingConfig(width=4, num_passes=40), expected_classes=4)
    train(make_strategy([replay]), streams().train_stream)
    first, second = replay.report
    assert first["quality"] == second["quality"] == memory_of(replay).summary()["quality"]
    assert len(first["accuracies"]) > 1 and "accuracies" not in second


def test_wrong_settings_are_refused_at_once() -> None:
    for quality in (0, 101, 2.5):
        with pytest.raises(ConfigError, match="quality must be None or a whole number"):
            JPEGReplay(BUDGET, quality=quality)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'herding'"):
        RawReplay(BUDGET, selection="herdin")
    with pytest.raises(BudgetError):
        RawReplay("much")
    with pytest.raises(ConfigError, match="mode must be"):
        RawReplay(BUDGET, mode="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'jpeg' holds real images: use RawReplay, JPEGReplay or"):
        HMNReplay(BUDGET, kind="jpeg")


@pytest.mark.parametrize(("make", "options"), KINDS)
@pytest.mark.parametrize("renew", ["before", "after"])
def test_a_budget_below_one_image_a_class_is_refused_before_training(
    make: Any, options: Any, renew: Any
) -> None:
    def needed(caught: Any) -> int:
        return int(str(caught.value).split("about ")[1].split()[0].replace(",", ""))

    with pytest.raises(BudgetError, match=r"150 bytes does not hold .* of 2 classes") as caught:
        train(make_strategy([make(150, renew=renew, **options)]), streams().train_stream[:1])
    stream = labelled_streams(*((label,) for label in range(12))).train_stream
    replay = make(needed(caught) + 40, renew=renew, **options)
    strategy = make_strategy([replay], model=make_model(12))
    with pytest.raises(BudgetError, match="does not hold one image of each of") as caught:
        for experience in stream:
            before = weights(strategy)
            strategy.train(experience)
    assert torch.equal(weights(strategy), before) and len(replay.report) > 1
    enough = make(needed(caught) + 20, renew=renew, **options)
    train(make_strategy([enough], model=make_model(12)), stream[: len(replay.report) + 1])
    kept = memory_of(enough).images_per_class
    assert len(kept) == len(replay.report) + 1 and min(kept) == 1


def test_classes_that_are_expected_are_counted() -> None:
    replay = JPEGReplay(BUDGET, quality=30, expected_classes=400)
    with pytest.raises(BudgetError, match="one image of each of 400 classes"):
        train(make_strategy([replay]), streams().train_stream[:1])


def test_pieces_are_refused_at_the_first_of_a_class_too_many() -> None:
    online = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    with pytest.raises(BudgetError, match=r"does not hold one image of each of [34] classes"):
        train(make_strategy([RawReplay(750)]), online)


def test_a_memory_of_another_kind_is_not_extended() -> None:
    for other in (JPEGReplay(BUDGET), HMNReplay(6000, **TINY)):
        replay = RawReplay(BUDGET)
        strategy = make_strategy([replay])
        strategy.train(streams().train_stream[0])
        with pytest.raises(ConfigError, match=r"expected a .*Memory to go on from, got RawMemory"):
            other.memory = replay.memory


class Shown(SupervisedPlugin[Any]):
    """Notes the current images of each step, and their memory."""

    def __init__(self, replay: MemoryReplay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replay, self.shown = replay, list[tuple[Tensor, Memory | None]]()

    def before_forward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Note them."""
        current = strategy.mb_x[~self.replay.replay_mask]
        self.shown.append((current.clone(), self.replay.memory))


def shown_images(share: float) -> list[tuple[Tensor, Memory | None]]:
    replay = JPEGReplay(BUDGET, quality=30, renew="after", recode_share=share)
    shown = Shown(replay)
    train(make_strategy([replay, shown]), streams().train_stream)
    return shown.shown


def test_a_share_of_the_current_images_goes_through_the_codec() -> None:
    plain, all_coded, some = shown_images(0.0), shown_images(1.0), shown_images(0.5)
    num_coded = num_shown = 0
    for (images, memory), (coded, _), (mixed, _) in zip(plain, all_coded, some, strict=True):
        if memory is None:
            assert coded.equal(images) and mixed.equal(images)
            continue
        assert isinstance(memory, RealMemory)
        pixels = images.mul(255).round().to(torch.uint8)
        expected = memory.recode(pixels).float() / 255
        assert coded.equal(expected) and not coded.equal(images)
        is_coded = (mixed == expected).flatten(1).all(1)
        assert (is_coded | (mixed == images).flatten(1).all(1)).all()
        num_coded, num_shown = num_coded + int(is_coded.sum()), num_shown + len(images)
    assert 0 < num_coded < num_shown
    for one, two in zip(some, shown_images(0.5), strict=True):
        assert one[0].equal(two[0])


def test_only_a_codec_can_recode_and_a_share_is_a_share() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"recode_share must be in \[0, 1\]"):
            JPEGReplay(BUDGET, recode_share=share)
    with pytest.raises(ConfigError, match="recode_share are for a memory beside raw images"):
        JPEGReplay(BUDGET, recode_share=0.5, mode="memory_only")
    with pytest.raises(ConfigError, match=r"a codec, .*; 'pixels' has none"):
        MemoryReplay(LearnedKeeper(BUDGET, kind="pixels"), recode_share=0.5)
    with pytest.raises(ConfigError, match=r"a codec, .*; 'haba' has none"):
        HMNReplay(BUDGET, kind="haba", recode_share=0.5)


def test_a_memory_that_turns_out_to_have_no_codec_is_refused() -> None:
    class Bare(RawMemory):
        def codec(self) -> None:
            return None

    class BareKeeper(FirstKeeper):
        def renew(self, images: Any, **context: Any) -> Any:
            memory, report = super().renew(images, **context)
            bare = Bare(memory.image_shape)
            bare.extend(LabelledImages(*memory.decode(dtype=torch.uint8)))
            return bare, report

    replay = MemoryReplay(BareKeeper(), recode_share=0.5)
    with pytest.raises(ConfigError, match="has none"):
        train(make_strategy([replay]), streams().train_stream)


def test_images_are_shown_through_hmns_codec() -> None:
    options: dict[str, Any] = {**TINY, "beta_grid": ()}
    replays = [HMNReplay(6000, recode_share=share, **options) for share in (0.0, 1.0)]
    plain, coded = Shown(replays[0]), Shown(replays[1])
    for replay, shown in zip(replays, (plain, coded), strict=True):
        train(make_strategy([replay, shown]), streams().train_stream)
    for (images, _), (through, memory) in zip(plain.shown, coded.shown, strict=True):
        assert memory is not None
        codec = memory.codec()
        assert codec is not None
        pixels = images.mul(255).round().to(torch.uint8)
        assert through.equal(codec(pixels).float() / 255) and not through.equal(images)


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_an_option_that_there_is_not_is_refused(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UnknownOptionError, match=f"{kind.__name__} .*'trainig'.*'training'"):
        kind(BUDGET, trainig=None, **options)


@pytest.mark.parametrize("expected", ["ten", -3, 0, 2.5, True, 1001])
@pytest.mark.parametrize("kind", [HMNReplay, *MEMORIES])
def test_a_number_of_classes_that_cannot_be_is_refused_at_once(kind: Any, expected: Any) -> None:
    with pytest.raises(ConfigError, match="expected_classes is 1 to 1000"):
        kind(BUDGET, expected_classes=expected)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("jpg", "jpeg"),
        ("hmn", "'hmn' is learned, and has a LearnedKeeper"),
        ("jpeg", "use a JPEGKeeper"),
        ("pq", "'pq' needs num_parts=; use a PQKeeper"),
    ],
)
def test_a_keeper_of_real_images_refuses_other_kinds(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RealKeeper(BUDGET, kind=kind)


def test_a_kind_of_a_users_is_replayed_with_its_settings() -> None:
    class PosterReplay(RawReplay):
        """Replays images of few levels."""

        kind = "a-postermemory"

    with registered(PosterMemory) as kind:
        own: Any = PosterReplay
        replays = own(BUDGET, levels=8), MemoryReplay(RealKeeper(BUDGET, kind=kind, levels=8))
        for replay in replays:
            train(make_strategy([replay]), streams().train_stream)
            assert memory_of(replay).summary()["levels"] == 8
        with pytest.raises(UnknownOptionError, match=r"PosterReplay .*'level'.*'levels'"):
            own(BUDGET, level=8)
    with pytest.raises(UnknownOptionError, match=r"'factor'; .*'subsampled'"):
        RawReplay(BUDGET, factor=2)  # type: ignore[call-arg]

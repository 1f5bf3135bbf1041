"""The replay memory without a framework: what it keeps, draws, and goes on with; all kinds."""

from __future__ import annotations

import bisect
import copy
import pickle
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hmn_replay import Budget, HMNReplay, LabelledImages, ReplayMemory, load_dataset
from hmn_replay.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DataError,
    HMNReplayWarning,
    UnknownOptionError,
)
from hmn_replay.memory import MEMORIES, JPEGMemory, RawMemory
from hmn_replay.memory.labels import Labeller
from hmn_replay.replay import Keeper, RealKeeper, make_keeper, store
from hmn_replay.training.networks import build_network
from hmn_replay.training.train import TrainingConfig
from tests.support import LEARNED, REAL, TINY, PosterMemory, real_set, registered

CODECS: dict[str, dict[str, Any]] = {"jpeg": {"quality": 30}}
QUICK = {name: value for name, value in TINY.items() if name != "device"}
FEW = {**QUICK, "beta_grid": (0.5,), "expected_classes": 4}


def make(kind: str, budget: int = 6000, **options: Any) -> ReplayMemory:
    usual = FEW if kind in LEARNED else CODECS.get(kind, {})
    return ReplayMemory(budget, kind, device="cpu", **{**usual, **options})


def batch(*classes: int, each: int = 8, seed: int = 0) -> LabelledImages:
    return real_set(classes=classes, counts=[each] * len(classes), seed=seed)


@pytest.mark.filterwarnings("ignore:the budget of .* is planned for")
@pytest.mark.parametrize("kind", [*LEARNED, *REAL])
def test_it_keeps_every_class_within_the_budget_and_draws_from_all(kind: str) -> None:
    memory = make(kind)
    assert len(memory) == memory.memory_bytes == 0
    for classes in ((0, 1), (2, 3)):
        data = batch(*classes)
        returned = memory.update(data.images, data.labels)
        assert returned is memory.memory and type(returned) is MEMORIES[kind]
        assert len(returned.to_bytes()) == memory.memory_bytes <= 6000
    assert returned.classes.tolist() == [0, 1, 2, 3] and min(returned.images_per_class) > 0
    images, labels = memory.sample(len(memory))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    # Decoded images are kept as bytes.
    everything, known = returned.decode(dtype=torch.uint8)
    expected = sorted(zip(known.tolist(), everything.flatten(1).tolist(), strict=True))
    pixels = images.mul(255).round().to(torch.uint8).flatten(1)
    assert sorted(zip(labels.tolist(), pixels.tolist(), strict=True)) == expected
    assert [entry["update"] for entry in memory.report] == [0, 1]
    assert memory.report[1]["file_bytes"] == memory.memory_bytes
    assert memory.report[1]["fill"] == pytest.approx(memory.memory_bytes / 6000, abs=1e-3)


@pytest.mark.parametrize("kind", ["hmn", "jpeg"])
def test_a_state_goes_on_with_the_same_bits(kind: str, untouched_random_state: None) -> None:
    first = make(kind)
    first.update(batch(0, 1))
    first.sample(3)
    first.gather(batch(2, seed=1))
    second = make(kind)
    second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    third = pickle.loads(pickle.dumps(first))
    ends = []
    for memory in (first, second, third):
        drawn = memory.sample(4)[0]
        assert memory.finish(note={"by": "me"}) and not memory.finish()
        assert memory.report[-1]["by"] == "me" and memory.report[0] == first.report[0]
        assert memory.memory is not None
        ends.append((drawn.tolist(), memory.memory.to_bytes(), memory.sample(4)[1].tolist()))
    assert ends[0] == ends[1] == ends[2]
    state = first.state_dict()
    with pytest.raises(CheckpointError, match="digest"):
        second.load_state_dict({**state, "num_draws": 0})


@pytest.mark.parametrize("kind", ["hmn", "jpeg", "raw"])
def test_it_makes_what_the_plugin_of_the_same_seed_makes(kind: str) -> None:
    from hmn_replay import JPEGReplay, RawReplay
    from tests.streams import Images, make_strategy, streams, train

    data = Images()
    own = make(kind, seed=3)
    plugins: dict[str, Any] = {
        "hmn": partial(HMNReplay, **FEW),
        "jpeg": partial(JPEGReplay, quality=30),
        "raw": RawReplay,
    }
    plugin = plugins[kind](6000, seed=3)
    stream = streams(data=data).train_stream
    train(make_strategy([plugin]), stream)
    for experience in stream:
        own.update([item[:2] for item in experience.dataset.eval()])
    assert own.memory is not None
    assert own.memory.to_bytes() == plugin.memory.to_bytes()


def test_draws_are_seeded_differ_and_touch_no_global_state() -> None:
    def draws(seed: int) -> list[list[Any]]:
        memory = make("raw", seed=seed, budget=100_000)
        memory.update(batch(0, 1, each=20))
        return [memory.sample(5)[0].flatten().tolist() for _ in range(2)]

    def state() -> Any:
        kept: Any = np.random.get_state()
        return random.getstate(), kept[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    first = draws(0)
    assert first == draws(0) != draws(1) and first[0] != first[1]
    assert state() == before


def test_images_are_drawn_in_the_dtype_that_is_asked_for() -> None:
    memory = make("raw")
    data = batch(0, each=3)
    memory.update(data)
    images, _ = memory.sample(9, dtype=torch.uint8)
    assert sorted(map(bytes, images.numpy())) == sorted(map(bytes, data.images.numpy()))
    assert memory.sample(2, dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(ConfigError, match=r"floating one or torch.uint8; got torch.int64"):
        memory.sample(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"dtype must be a torch\.dtype, .* got 'uint8'"):
        memory.sample(2, dtype="uint8")  # type: ignore[arg-type]
    assert len(memory.sample(2, device="auto")[0]) == 2


def test_it_is_shown_in_one_line() -> None:
    memory = make("raw")
    assert repr(memory) == "ReplayMemory(RealKeeper, 6,000 bytes, 0 updates, memory=None)"
    memory.update(batch(0))
    assert repr(memory) == (
        f"ReplayMemory(RealKeeper, 6,000 bytes, 1 updates, memory={memory.memory!r})"
    )


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_a_wrong_count_and_an_empty_memory_are_refused(count: Any) -> None:
    memory = make("raw")
    with pytest.raises(ConfigError, match=r"the memory is empty; call update\(\) first"):
        memory.sample(1)
    memory.update(batch(0))
    with pytest.raises(ConfigError, match="count must be a whole number of 1 or more"):
        memory.sample(count)


def test_what_a_kind_does_not_have_is_refused() -> None:
    with pytest.raises(TypeError, match="the memory kind 'raw' has no option 'quality'"):
        ReplayMemory(6000, "raw", quality=3)
    with pytest.raises(TypeError, match="did you mean 'outer_steps'"):
        ReplayMemory(6000, outer_step=3)
    for kind in ("hmn", "raw"):
        with pytest.raises(TypeError, match=r"'quality'; it is an option of .* kind 'jpeg'$"):
            ReplayMemory(6000, kind, quality=3)
    with pytest.raises(TypeError, match=r"an option of the memory kinds 'features', .*'hmn'"):
        ReplayMemory(6000, "raw", outer_steps=3)
    with pytest.raises(TypeError, match=r"'xyz'; the command 'hmn-replay options' lists [^,]+$"):
        ReplayMemory(6000, xyz=3)
    with pytest.raises(TypeError, match=r"'xyz'; it has expected_classes, selection, training$"):
        ReplayMemory(6000, "raw", xyz=3)
    with pytest.raises(ConfigError, match="memory kind"):
        ReplayMemory(6000, "jpg")
    with pytest.raises(BudgetError):
        ReplayMemory("much")
    with pytest.raises(ConfigError, match="max_raw_images"):
        ReplayMemory(6000, max_raw_images=0)


@pytest.mark.parametrize("options", [("jpeg", "quality"), ("subsampled", "factor")])
def test_settings_of_codecs_may_be_numpys(options: tuple[str, str]) -> None:
    kind, name = options
    codecs: list[dict[str, Any]] = [{name: np.int64(5)}, {name: 5}]
    memory, other = (make(kind, **codec) for codec in codecs)
    assert memory.update(batch(0, 1)).to_bytes() == other.update(batch(0, 1)).to_bytes()
    assert memory.report[0].get(name) == other.report[0].get(name)


@pytest.mark.parametrize(("kind", "options"), [("raw", {}), ("jpeg", {"quality": 20})])
def test_an_update_that_would_lose_a_class_is_refused_and_changes_nothing(
    kind: str, options: dict[str, Any]
) -> None:
    memory = ReplayMemory(700, kind, device="cpu", **options)
    held = 0
    with pytest.raises(BudgetError, match="does not hold one image of each of"):
        for held in range(20):
            before = memory.state_dict()["digest"]
            memory.update(batch(held, each=3))
    assert memory.memory is not None and memory.memory.classes.tolist() == [*range(held)]
    assert memory.state_dict()["digest"] == before and memory.num_updates == held > 0
    expecting = ReplayMemory(700, kind, expected_classes=20, device="cpu", **options)
    with pytest.raises(BudgetError, match="one image of each of 20 classes"):
        expecting.update(batch(0))
    assert expecting.memory is None


def test_a_memory_that_cannot_be_gone_on_from_is_refused_when_it_is_set() -> None:
    memory, other = make("raw", 6000), make("raw", 9000)
    other.update(batch(0, 1, each=30))
    assert other.memory is not None and other.memory_bytes > 6000
    with pytest.raises(BudgetError, match=r"call memory\.shrink\(6000\) first"):
        memory.memory = other.memory
    with pytest.raises(CheckpointError, match="the budget is 6,000"):
        memory.load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match=r"expected a RawMemory .* got str: pass what .*load"):
        memory.memory = "seen.hmn"  # type: ignore[assignment]
    jpeg = make("jpeg")
    jpeg.update(batch(0))
    with pytest.raises(ConfigError, match=r"expected a RawMemory to go on from, got JPEGMemory"):
        memory.memory = jpeg.memory
    with pytest.raises(CheckpointError, match="expected a RawMemory"):
        memory.load_state_dict(jpeg.state_dict())
    assert memory.memory is None
    other.memory.shrink(6000)
    memory.memory = other.memory
    assert memory.memory_bytes <= 6000
    memory.memory = None
    assert len(memory) == 0


def test_labels_keep_a_memory_of_another_budget_within_the_keepers() -> None:
    other = make("raw", 9000)
    other.update(batch(3, 5, each=5))
    assert other.memory is not None and other.memory.budget_bytes == 9000
    memory = make("raw", other.memory_bytes + 8)
    memory.memory = other.memory
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    assert memory.label(network)
    assert memory.memory_bytes <= other.memory_bytes + 8
    restored = pickle.loads(pickle.dumps(memory))
    assert restored.memory.to_bytes() == memory.memory.to_bytes()


def two_digits(first: int) -> LabelledImages:
    digits = load_dataset("digits", "train")
    chosen = torch.cat([digits.of_class(label)[:10] for label in (first, first + 1)])
    return LabelledImages(digits.images[chosen], digits.labels[chosen])


@pytest.mark.parametrize("budget", [640, 700, 760, 900])
def test_a_chosen_quality_leaves_room_for_the_classes_that_are_expected(budget: int) -> None:
    training = TrainingConfig(width=4, num_passes=40)
    memory = ReplayMemory(budget, "jpeg", expected_classes=10, training=training, device="cpu")
    for first in (0, 2, 4, 6, 8):
        memory.update(two_digits(first))
    assert len(memory.report[-1]["images_per_class"]) == 10 and memory.memory_bytes <= budget
    # Where there is nothing to choose by 20 is taken, for which 640 bytes have no room.
    assert budget > 640 or memory.report[0]["quality"] < 20


@pytest.mark.filterwarnings("ignore:images keep hard labels")
def test_images_lose_their_labels_before_an_update_is_refused() -> None:
    memory = ReplayMemory(958, "raw", expected_classes=10, device="cpu")
    with pytest.warns(HMNReplayWarning, match="images lost their soft labels, to make room"):
        for first in (0, 2, 4, 6, 8):
            memory.check_room(two_digits(first))
            count = memory.update(two_digits(first)).num_classes
            memory.label(lambda images, k=count: torch.zeros(len(images), k))  # type: ignore[misc]
    assert memory.memory is not None and memory.memory_bytes <= 958
    assert memory.memory.images_per_class == [1] * 10


@pytest.mark.parametrize("known", ["gathered", "in the memory"])
def test_gathered_images_are_of_one_size(known: str) -> None:
    memory = make("raw")
    (memory.gather if known == "gathered" else memory.update)(batch(0, 1))
    wrong = LabelledImages(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), torch.tensor([2, 3]))
    with pytest.raises(DataError, match=r"\(3, 9, 9\); (all|both) must have the same"):
        memory.gather(wrong)
    memory.gather(batch(2))
    assert memory.finish() and memory.memory is not None
    assert 2 in memory.memory.classes.tolist()


def test_gathered_images_keep_their_names(untouched_random_state: None) -> None:
    named = LabelledImages(batch(0, 1).images, batch(0, 1).labels, {0: "cat", 1: "dog"})
    memory = make("raw")
    memory.gather(named)
    with pytest.raises(DataError, match="label 0 is 'cat'"):
        memory.gather(LabelledImages(named.images, named.labels, {0: "cow"}))
    with pytest.warns(HMNReplayWarning, match="'cat' is label 0 in the memory and 5 in the images"):
        memory.gather(LabelledImages(batch(5).images, batch(5).labels, {5: "cat"}))
    memory.gatherer.clear()
    memory.gather(named)
    key = 2**32 + 1  # of another task, whose classes may be called the same
    memory.gather(LabelledImages(batch(5).images, batch(5).labels - 5 + key, {key: "cat"}))
    memory.gatherer.clear()
    memory.gather(named)
    again = pickle.loads(pickle.dumps(memory))
    for each in (memory, again):
        assert each.finish()
        assert each.memory is not None and each.memory.class_names == {0: "cat", 1: "dog"}
        with pytest.raises(DataError, match="label 1 is 'dog'"):
            each.gather(LabelledImages(named.images, named.labels, {1: "cow"}))


def test_a_data_set_that_draws_is_read_with_draws_of_the_memorys_own(
    untouched_random_state: None,
) -> None:
    class Drawing(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(3, 8, 8), index % 2

    one, two = make("raw"), make("raw")
    first = one.update(Drawing()).to_bytes()
    torch.rand(1, generator=torch.Generator())
    assert two.update(Drawing()).to_bytes() == first
    two.gather(Drawing())
    assert two.finish()


def test_what_was_pickled_elsewhere_goes_on_where_it_is() -> None:
    memory = make("raw")
    memory.update(batch(0, 1))
    memory.device = torch.device("cuda", 99)  # as on a machine that has one
    again = pickle.loads(pickle.dumps(memory))
    assert again.device == torch.device("cpu") and len(again) == len(memory)
    again.update(batch(2))
    assert again.sample(4)[0].device.type == "cpu"


def test_what_is_pickled_has_the_memory_once() -> None:
    memory = make("raw", 100_000)
    memory.update(batch(0, 1, each=100))
    assert len(pickle.dumps(memory)) < 1.2 * memory.memory_bytes


def test_a_class_without_images_is_no_class_that_is_lost() -> None:
    memory = make("raw")
    memory.update(batch(0, 1))
    assert memory.memory is not None
    memory.memory.keep((memory.memory.labels == 1).nonzero().flatten())
    assert memory.update(batch(2)).classes.tolist() == [1, 2]


def test_names_that_take_too_much_take_no_room() -> None:
    data = batch(0, 1, 2, 3, each=2)
    named = LabelledImages(data.images, data.labels, {k: f"{k}" * 60 for k in range(4)})
    assert ReplayMemory(1_150, "raw", device="cpu").update(named).num_classes == 4


def test_room_is_checked_without_a_draw_of_the_callers() -> None:
    class Drawing(Keeper):
        def check_room(self, images: LabelledImages, **_: Any) -> None:
            torch.rand(3)

        def renew(self, images: LabelledImages, **_: Any) -> Any:
            memory = RawMemory(images.image_shape)
            memory.extend(images)
            return memory, {}

    state = torch.get_rng_state()
    ReplayMemory(Drawing(), device="cpu").update(batch(0))
    assert torch.get_rng_state().equal(state)


def test_an_option_with_a_typing_error_is_told_what_it_may_have_been() -> None:
    for make_one in (
        lambda: ReplayMemory(6000, expected_clases=3),
        lambda: HMNReplay(6000, expected_clases=3),
    ):
        with pytest.raises(
            TypeError, match=r"no option 'expected_clases'; did you mean 'expected_"
        ):
            make_one()
    with pytest.raises(TypeError, match="HMNReplay has no option 'batch_size'") as caught:
        HMNReplay(6000, batch_size=3)
    assert "batch_size_mem" in str(caught.value) and "teacher_width" not in str(caught.value)
    with pytest.raises(ConfigError, match="in a stream the network that learns makes the labels"):
        HMNReplay(6000, teacher_width=3)


@pytest.mark.parametrize(
    ("reads", "value"), [(str, "two words"), (bool, False), (int, "x"), (str, "")]
)
def test_a_setting_that_its_file_would_not_give_back_is_refused(reads: Any, value: Any) -> None:
    class Flagged(RawMemory):
        setting_types: ClassVar = {"flag": reads}

        def __init__(self, shape: Any, *, flag: Any = 1, budget: Any = None) -> None:
            super().__init__(shape, budget=budget)
            self.flag = reads(flag) if flag == 1 else flag

    with registered(Flagged) as kind:
        make(kind).update(batch(1))
        with pytest.raises(ConfigError, match=f"cannot keep flag={value!r} in a file"):
            ReplayMemory(6000, kind, flag=value)


@pytest.mark.parametrize("name", ["seed", "selection"])
def test_a_setting_with_the_name_of_an_argument_is_refused(name: str) -> None:
    class Seeded(RawMemory):
        setting_types: ClassVar = {name: int}

        def __init__(self, shape: Any, *, budget: Any = None, **settings: int) -> None:
            super().__init__(shape, budget=budget)
            self.seed = self.selection = settings.get(name, 0)

    with registered(Seeded) as kind, pytest.raises(ConfigError, match="rename the setting"):
        ReplayMemory(6000, kind, **{name: 5})  # type: ignore[arg-type]


def with_a_labeller() -> ReplayMemory:
    memory = make("raw")
    memory.update(batch(0))
    assert memory.memory is not None
    network = build_network("convnet", (3, 8, 8), 1, width=4)
    memory.memory.set_labeller(Labeller.of(network, (3, 8, 8)))
    return memory


def test_real_images_that_are_added_do_not_lose_a_labeller_silently() -> None:
    memory = with_a_labeller()
    with pytest.warns(HMNReplayWarning, match="labeller does not know the classes"):
        memory.update(batch(1))


def test_a_network_of_this_package_says_itself_what_its_logits_stand_for() -> None:
    network = build_network("convnet", (3, 8, 8), 3, width=4)
    found = []
    for classes in ([5, 3, 4], None):
        memory = make("raw")
        memory.update(batch(3, 5))
        if classes is None:
            network.classes.copy_(torch.tensor([5, 3, 4]))
        memory.label(network, classes=classes)
        assert memory.memory is not None
        found.append(memory.memory.soft_labels())
    assert found[0].equal(found[1])


def test_a_check_of_room_does_not_warn_of_what_an_update_would_do() -> None:
    memory = with_a_labeller()
    memory.check_room(batch(1))
    assert memory.memory is not None and memory.memory.labeller is not None


def test_a_network_that_labels_has_a_logit_for_each_class_of_the_memory() -> None:
    memory = make("raw")
    memory.update(batch(3, 5))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    for wrong in ([3], [3, 5, 7], range(9)):
        with pytest.raises(ConfigError, match=r"of 10 logits for \d labels there is none for"):
            memory.label(network, classes=wrong)
    few = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    with pytest.raises(ConfigError, match=r"of 5 logits for 5 labels there is none for \[5\]"):
        memory.label(few)
    with pytest.raises(ConfigError, match="some occur twice or more"):
        memory.label(network, classes=[3, 5, 5, *range(10, 17)])
    with pytest.raises(ConfigError, match=r"expected logits \(B, L\); got shape \(\d+,\)"):
        memory.label(lambda images: images.mean(dim=(1, 2, 3)))
    with pytest.raises(ConfigError, match=r"views must be a whole number of 1 or more; got 1\.5"):
        memory.label(network, views=1.5)  # type: ignore[arg-type]
    own = copy.deepcopy(memory)
    order = torch.randperm(10)
    assert memory.label(network) == own.label(
        lambda images: network(images)[:, order], classes=order
    )
    assert memory.memory is not None and own.memory is not None
    assert memory.memory.soft_labels().equal(own.memory.soft_labels())
    assert memory.report[-1]["file_bytes"] == memory.memory_bytes
    assert memory.report[-1]["fill"] == memory.memory_bytes / (memory.memory.budget_bytes or 0)


def test_room_is_checked_before_it_is_needed() -> None:
    memory = make("raw", budget=900)
    memory.check_room(batch(0, 1))
    memory.update(batch(0, 1))
    with pytest.raises(BudgetError, match="does not hold one image of each of 5 classes"):
        memory.check_room(batch(2, 3, 4))
    memory.gather(batch(5))
    assert memory.count_classes(batch(1, 2)) == 4
    with pytest.raises(DataError):
        memory.update(torch.rand(3, 8, 8, 8), torch.zeros(3))


def test_a_selection_sees_the_network() -> None:
    seen: list[nn.Module] = []

    def last(images: LabelledImages, model: nn.Module) -> Tensor:
        seen.append(model)
        return torch.arange(len(images)).flip(0)

    memory = make("raw", budget=700, selection=last)
    data, model = batch(0), nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="pass model="):
        memory.update(data)
    kept = memory.update(data, model=model).decode(dtype=torch.uint8)[0]
    assert seen == [model] and torch.equal(kept[0], data.images[-1])


def test_a_keeper_of_ones_own() -> None:
    class Newest(Keeper):
        def renew(self, images: LabelledImages, **_: Any) -> Any:
            memory = RawMemory(images.image_shape)
            memory.extend(images)
            return memory, {}

    memory = ReplayMemory(Newest())
    memory.update(batch(0))
    assert memory.update(batch(4)).classes.tolist() == [4]
    with pytest.raises(ConfigError, match="has its own kind"):
        ReplayMemory(Newest(), quality=3)


def test_a_keeper_that_goes_beyond_its_budget_is_stopped() -> None:
    class Beyond(Keeper):
        budget = Budget(1000)

        def renew(self, images: LabelledImages, **context: Any) -> tuple[RawMemory, dict[str, Any]]:
            memory = RawMemory(images.image_shape)
            memory.extend(images)
            return memory, {}

    memory = ReplayMemory(Beyond(), device="cpu")
    with pytest.raises(BudgetError, match=r"takes [\d,]+ bytes and the budget is 1,000"):
        memory.update(batch(0, 1))
    assert memory.memory is None and memory.report == [] and memory.num_updates == 0


def test_a_report_may_have_what_json_has_not() -> None:
    class Noting(Keeper):
        def renew(self, images: LabelledImages, **_: Any) -> Any:
            memory = RawMemory(images.image_shape)
            memory.extend(images)
            return memory, {"mean": np.float32(0.5), "rows": torch.arange(2), "path": Path("a")}

    memory = ReplayMemory(Noting(), device="cpu")
    memory.update(batch(0))
    assert {"mean": 0.5, "rows": [0, 1], "path": "a"}.items() <= memory.report[0].items()


def test_ccs_of_features_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="ccs scores by trainings on images"):
        ReplayMemory(6000, "raw-features", selection="ccs")


def test_a_kind_that_derives_from_another_takes_its_settings() -> None:
    class Other(JPEGMemory):
        """Another JPEG."""

    with registered(Other) as kind:
        with pytest.raises(ConfigError, match="'a-other' needs quality=; give it, or use"):
            ReplayMemory(6000, kind)
        memory = ReplayMemory(6000, kind, quality=30, device="cpu")
        assert memory.update(batch(0)).summary()["quality"] == 30
        assert type(memory.memory) is Other


def test_a_kind_of_a_users_takes_its_settings() -> None:
    with registered(PosterMemory) as kind:
        assert isinstance(make_keeper(6000, kind), RealKeeper)
        for memory, levels in ((make(kind), 4), (make(kind, levels=8, selection="random"), 8)):
            memory.update(batch(0))
            assert memory.update(batch(1)).summary()["levels"] == levels
        with pytest.raises(ConfigError, match="levels is 2 to 256; got 1"):
            ReplayMemory(6000, kind, levels=1)
        with pytest.raises(UnknownOptionError, match=f"{kind!r} has no option 'level'.*'levels'"):
            ReplayMemory(6000, kind, level=8)
        with pytest.raises(UnknownOptionError, match=f"option of the memory kind {kind!r}"):
            ReplayMemory(6000, "raw", levels=8)


def test_subsampled_images_need_no_keeper_of_their_own() -> None:
    made = make_keeper(6000, "subsampled", factor=3)
    assert type(made) is RealKeeper
    keepers = RealKeeper(6000, kind="subsampled", factor=3), made
    memories = [ReplayMemory(keeper, device="cpu") for keeper in keepers]
    first, second = (memory.update(batch(0)).to_bytes() for memory in memories)
    assert first == second
    with pytest.raises(ConfigError, match="factor is a whole number from 2 to 8; got 9"):
        RealKeeper(6000, kind="subsampled", factor=9)


def test_progress_is_a_line_an_update(capsys: pytest.CaptureFixture[str]) -> None:
    make("raw", progress=True).update(batch(0))
    assert capsys.readouterr().err.startswith("hmn_replay, update 0: 8 images of 1 classes in ")


def test_it_needs_no_avalanche() -> None:
    code = (
        "import sys, torch, hmn_replay\n"
        "memory = hmn_replay.ReplayMemory(9000, 'raw')\n"
        "memory.update(torch.rand(6, 3, 8, 8), torch.arange(6) % 2)\n"
        "assert len(memory.sample(4)[0]) == 4\n"
        "sys.exit('avalanche' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_memories_are_renewed_in_two_threads_as_in_one() -> None:
    """Those that draw from global generators, as a user's selection may, wait for each other."""

    def chosen(images: LabelledImages, model: nn.Module) -> torch.Tensor:
        order = [torch.randperm(len(images)) for _ in range(200)]
        return order[-1]

    def make(_: int) -> bytes:
        memory = ReplayMemory("1 KiB", "raw", selection=chosen)
        memory.update(*some, model=nn.Identity())
        assert memory.memory is not None
        return memory.memory.to_bytes()

    generator = torch.Generator().manual_seed(0)
    some = (
        torch.randint(0, 256, (40, 1, 8, 8), generator=generator, dtype=torch.uint8),
        torch.arange(40) % 4,
    )
    before, expected = torch.get_rng_state(), make(0)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make, range(12))) == {expected}
    assert torch.get_rng_state().equal(before)


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the digest that fits it, as someone with bad intent would make it."""

    def digest_of(values: dict[str, Any]) -> str:
        digest = blake2b(digest_size=16)
        for name, value in sorted(values.items()):
            value = digest_of(value) if isinstance(value, dict) else value
            if isinstance(value, Tensor):
                digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
                digest.update(value.contiguous().numpy().tobytes())
            else:
                digest.update(repr((name, value)).encode())
        return digest.hexdigest()

    plain = {name: value for name, value in state.items() if name != "digest"}
    return {**plain, "digest": digest_of(plain)}


def test_a_digest_is_of_tensors_of_any_dtype() -> None:
    values = torch.arange(6).view(2, 3)
    digests = {
        store.digest_state({"of": {"all": each}})
        for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool)
        for each in (values.to(dtype), values.to(dtype).T, values.to(dtype)[1, 2])
    }
    assert len(digests) == 12


def waiting() -> ReplayMemory:
    memory = make("raw")
    memory.update(batch(0, 1))
    memory.gather(batch(2, seed=1))
    return memory


def test_no_flipped_bit_of_a_state_goes_unseen() -> None:
    memory, rng = waiting(), random.Random(0)
    state = memory.state_dict()
    assert sealed(state)["digest"] == state["digest"]
    for number in range(60):
        changed = pickle.loads(pickle.dumps(state))
        owner = changed["pending"] if number % 3 else changed
        tensors = [value for value in owner.values() if isinstance(value, Tensor) and len(value)]
        values = rng.choice(tensors).numpy().reshape(-1).view(np.uint8)
        values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
        with pytest.raises(CheckpointError, match="digest does not fit"):
            make("raw").load_state_dict(changed)


def test_a_crafted_state_is_refused_and_changes_nothing() -> None:
    memory, rng = waiting(), random.Random(0)
    state, target, num_refused = memory.state_dict(), make("raw"), 0
    junk: list[Any] = [None, -1, 2.5, "x", "[", "[1]", "9" * 5000, [], {}, torch.zeros(()), True]
    junk += [torch.zeros(3), torch.zeros(2, 3, 8, 8), torch.zeros(5, 2).long(), b"x"]
    for _ in range(200):
        changed = pickle.loads(pickle.dumps(state))
        owner = changed["pending"] if rng.random() < 0.5 else changed
        name = rng.choice([key for key in owner if key != "digest"])
        if rng.random() < 0.2:
            del owner[name]
        elif isinstance(owner[name], Tensor) and rng.random() < 0.4:
            owner[name] = owner[name].double() if rng.random() < 0.5 else owner[name][:-1]
        else:
            owner[name] = rng.choice(junk)
        before = sealed(target.state_dict())["digest"]
        try:
            target.load_state_dict(sealed(changed))
        except CheckpointError:
            num_refused += 1
            assert sealed(target.state_dict())["digest"] == before
        else:
            target.finish()
            target = make("raw")
    assert num_refused > 100


def test_old_images_make_room_where_they_take_more_than_planned() -> None:
    """None is dropped as planned, and new ones do not fit even without a bit of their own."""
    data = load_dataset("digits")
    options: dict[str, Any] = {"warm_start_steps": 100, "outer_steps": 0, "pruning": "order"}
    memory = ReplayMemory(1500, "hmn", device="cpu", **options)
    for classes in ((0, 1), (2, 3), (4, 5), (6, 7)):
        few = [data.of_class(label)[:20] for label in classes]
        memory.update(data.take(torch.cat(few)))
        assert memory.memory_bytes <= 1500
    assert memory.memory is not None and memory.memory.num_classes == 8
    assert min(memory.memory.images_per_class) > 4


def test_labels_that_would_take_a_class_its_last_image_are_left_out() -> None:
    data = real_set(classes=range(9), counts=[1] * 9, image_shape=(1, 8, 8))
    memory = ReplayMemory(1200, "raw", device="cpu")
    memory.update(data)
    memory = ReplayMemory(memory.memory_bytes + 4, "raw", device="cpu")
    memory.update(data)
    assert memory.memory is not None
    held = memory.memory.to_bytes()
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(HMNReplayWarning, match="images keep hard labels: .* one image of each of 9"):
        count = memory.label(lambda images: torch.randn(len(images), 9, generator=generator))
    assert count == 0 and memory.memory.to_bytes() == held


def test_a_device_that_has_been_looked_at_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = make("raw")
    asked: list[object] = []
    memory.update(batch(0, 1))
    memory.decoded(torch.device("cpu"))
    monkeypatch.setattr(store, "resolve_device", asked.append)
    memory.sample(2, device=torch.device("cpu"))
    memory.sample(2)
    assert not asked


@pytest.mark.parametrize("first_label", [0, 70_000, 2**40])
def test_room_for_labels_of_any_width_is_there_or_refused_at_first(first_label: int) -> None:
    def named(first: int) -> LabelledImages:
        data = two_digits(first)
        return LabelledImages(data.images, data.labels + first_label)

    def refuses(budget: int) -> bool:
        memory = ReplayMemory(budget, expected_classes=10, device="cpu", **QUICK)
        try:
            memory.check_room(named(0))
        except BudgetError:
            return True
        return False

    # Ten labels take a byte each, or four, or eight.
    width = {0: 1, 70_000: 4, 2**40: 8}[first_label]
    smallest = bisect.bisect_left(range(900), True, 600, key=lambda budget: not refuses(budget))
    beside = [680, *range(smallest - 3, smallest + 3), 839]
    assert [refuses(budget) for budget in beside] == [budget < smallest for budget in beside]
    plain = smallest - 10 * (width - 1)
    assert 690 < plain < 740
    options = {**QUICK, "outer_steps": 0, "beta_grid": ()}
    memory = ReplayMemory(900, expected_classes=10, device="cpu", **options)
    for first in (0, 2, 4, 6, 8):
        memory.check_room(named(first))
        memory.update(named(first))
    assert memory.memory is not None and memory.memory.num_classes == 10


@pytest.mark.parametrize("returned", [None, (None, {}), ()], ids=["none", "no memory", "empty"])
def test_a_keeper_returns_a_memory_and_a_report(returned: Any) -> None:
    class Wrong(Keeper):
        def renew(self, images: LabelledImages, **context: Any) -> Any:
            return returned

    memory = ReplayMemory(Wrong(), device="cpu")
    with pytest.raises(ConfigError, match="a keeper"):
        memory.update(batch(0, 1))
    assert memory.memory is None and not memory.report


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("mem_size", r"Budget\.raw_images"),
        ("num_classes", "expected_classes"),
        ("ipc", r"Budget\.ipc"),
    ],
)
@pytest.mark.parametrize("kind", ["hmn", "jpeg"])
def test_options_of_others_are_told_what_there_is(kind: str, option: str, hint: str) -> None:
    with pytest.raises(UnknownOptionError, match=hint):
        ReplayMemory("2 KiB", kind, **{option: 20})  # type: ignore[arg-type]


def test_a_config_is_one() -> None:
    with pytest.raises(ConfigError, match=r"config= is a hmn_replay.CondenseConfig; got \{'outer"):
        ReplayMemory("2 KiB", config={"outer_steps": 3})

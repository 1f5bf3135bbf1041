"""What the plugin does in Avalanche's training loop, with a memory that is made in no time."""

from __future__ import annotations

import copy
import inspect
import io
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.benchmarks import benchmark_from_datasets
from avalanche.benchmarks.utils import TransformGroups, as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier, SCRModel
from avalanche.models.cosine_layer import CosineIncrementalClassifier, CosineLinear
from avalanche.models.helper_method import as_multitask
from avalanche.training.plugins.ewc import EWCPlugin
from avalanche.training.plugins.lwf import LwFPlugin
from avalanche.training.plugins.replay import ReplayPlugin
from avalanche.training.supervised import JointTraining, Naive
from avalanche.training.supervised.der import DER
from avalanche.training.supervised.er_ace import ER_ACE
from avalanche.training.supervised.icarl import ICaRL
from avalanche.training.supervised.supervised_contrastive_replay import SCR
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision import transforms

from hmn_replay.avalanche.kinds import (
    HMNReplay,
    JPEGReplay,
    RawReplay,
    ReplayOptions,
)
from hmn_replay.avalanche.plugin import MemoryReplay
from hmn_replay.avalanche.streams import Normalization, images_of, split_class_keys
from hmn_replay.errors import CheckpointError, ConfigError, DataError, HMNReplayWarning
from hmn_replay.memory import RawMemory
from hmn_replay.replay import Keeper
from tests.streams import (
    SHAPE,
    Images,
    KeepFirst,
    in_pieces,
    labelled_streams,
    make_model,
    make_strategy,
    raw_memory,
    streams,
    train,
    weights,
)


def _numpy_state() -> Any:
    state: Any = np.random.get_state()
    return state[1]


class Recorder(SupervisedPlugin[Any]):
    """Notes each training mini-batch as the model sees it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batches: list[list[Tensor]] = []
        self.modes: list[bool] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.batches.append([part.clone() for part in strategy.mbatch])
        self.modes.append(all(module.training for module in strategy.model.modules()))


class Dark(Images):
    """The same images, nearly black."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        image, label = super().__getitem__(index)
        assert isinstance(image, Tensor)
        return image / 32, label


def pixels_of(replay: KeepFirst) -> Tensor:
    images: Tensor = replay.memory.decode(dtype=torch.uint8)[0]
    return images


def make_multi_head_model() -> nn.Module:
    model = nn.Sequential(nn.Flatten())
    model.classifier = nn.Linear(192, 2)
    return as_multitask(model, "classifier")


@pytest.mark.parametrize(("kind", "parts"), [("nc", 3), ("ci", 2), ("nc_tasks", 3)])
def test_decoded_images_come_at_the_end_of_each_minibatch(kind: str, parts: int) -> None:
    replay, recorder = KeepFirst(batch_size_mem=5, loss="plain"), Recorder()
    model = make_multi_head_model() if kind == "nc_tasks" else make_model()
    strategy = make_strategy([replay, recorder], model=model)
    benchmark = streams(kind)
    strategy.train(benchmark.train_stream[0])
    assert {len(batch[0]) for batch in recorder.batches} == {8, 4}
    memory = replay.memory
    recorder.batches.clear()
    strategy.train(benchmark.train_stream[1])
    for batch in recorder.batches:
        assert len(batch) == parts
        assert len(batch[0]) - 5 in (8, 4)
        images, labels = batch[0][-5:], batch[1][-5:]
        assert images.dtype == torch.float32 and batch[1].dtype == torch.int64
        assert set(labels.tolist()) <= {0, 1}
        known = {
            (image.numpy().tobytes(), int(label))
            for image, label in zip(*memory.decode(dtype=torch.uint8), strict=True)
        }
        pixels = images.mul(255).round().to(torch.uint8)
        drawn = {(p.numpy().tobytes(), int(y)) for p, y in zip(pixels, labels, strict=True)}
        assert len(drawn) == 5 and drawn <= known
        if parts == 3:
            assert batch[2].dtype == torch.int64
            assert batch[2][-5:].tolist() == [0] * 5
            assert set(batch[2][:-5].tolist()) == {1 if kind == "nc_tasks" else 0}
    if kind == "nc_tasks":
        assert replay.memory.labels.unique().tolist() == [0, 1, (1 << 32), (1 << 32) | 1]


def test_the_same_images_are_drawn_again_and_others_in_each_step() -> None:
    drawn = []
    for _ in range(2):
        recorder = Recorder()
        train(make_strategy([KeepFirst(batch_size_mem=3), recorder]), streams().train_stream)
        drawn.append([batch[0][-3:] for batch in recorder.batches[-3:]])
    assert all(map(torch.equal, *drawn))
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_counts_and_mask_tell_replayed_images_apart() -> None:
    seen: list[int] = []

    class Check(SupervisedPlugin[Any]):
        def after_forward(self, strategy: Any, **kwargs: Any) -> None:
            mask = replay.replay_mask
            assert mask.dtype == torch.bool and len(mask) == len(strategy.mb_x)
            assert int(mask.sum()) == replay.last_replay_size
            assert mask[len(mask) - replay.last_replay_size :].all()
            seen.append(replay.last_replay_size)

    replay = KeepFirst(per_class=2, renew="after")
    train(make_strategy([replay, Check()]), streams().train_stream)  # type: ignore[no-untyped-call]
    # The memory holds 4 images, fewer than a mini-batch of 8.
    assert seen == [0, 0, 0, 4, 4, 4]
    assert replay.last_replay_size == 0 and len(replay.replay_mask) == 0


def test_without_a_memory_training_is_bit_identical() -> None:
    class Forgetful(Keeper):
        def renew(self, images: Any, **_: Any) -> Any:
            random.random(), np.random.rand(), torch.rand(1)
            return RawMemory(SHAPE), {}

    trained = []
    for plugins in ([], [MemoryReplay(Forgetful())]):
        model = nn.Sequential(nn.Dropout(0.3), make_model())
        strategy = make_strategy(plugins, model=model, eval_every=1, train_epochs=2)
        random.seed(1)
        np.random.seed(1)
        train(strategy, streams().train_stream)
        state = (random.random(), np.random.rand(), float(torch.rand(())))
        trained.append((weights(strategy), state))
    (expected, expected_state), (found, found_state) = trained
    assert torch.equal(found, expected) and found_state == expected_state


def test_an_update_leaves_modes_gradients_and_random_states_alone() -> None:
    found: list[Any] = []

    def snapshot(strategy: Any) -> list[Any]:
        return [
            [module.training for module in strategy.model.modules()],
            [p.requires_grad for p in strategy.model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in strategy.model.parameters()],
            torch.is_grad_enabled(),
            torch.get_rng_state(),
            _numpy_state(),
            random.getstate(),
        ]

    class Around(SupervisedPlugin[Any]):
        def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
            found.append(snapshot(strategy))

    class Noisy(Images):
        def __getitem__(self, index: int) -> tuple[object, int]:
            random.random(), np.random.rand(), torch.rand(1)
            return super().__getitem__(index)

    model = make_model()
    assert isinstance(model, nn.Sequential)
    next(model.parameters()).requires_grad_(False)
    model[2].eval()
    around = [Around(), Around()]  # type: ignore[no-untyped-call]
    strategy = make_strategy([around[0], KeepFirst(), around[1]], model=model)
    strategy.train(streams(data=Noisy()).train_stream[0])
    before, after = found
    for old, new in zip(before[2], after[2], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert torch.equal(before[4], after[4]) and (before[5] == after[5]).all()
    assert [before[i] for i in (0, 1, 3, 6)] == [after[i] for i in (0, 1, 3, 6)]


def test_memory_only_trains_on_the_memory_from_the_second_experience_on() -> None:
    for kind in ("nc", "ci"):
        recorder, replay = Recorder(), KeepFirst(mode="memory_only")
        strategy = make_strategy([replay, recorder])
        benchmark = streams(kind)
        strategy.train(benchmark.train_stream[0])
        assert sum(len(batch[0]) for batch in recorder.batches) == 20
        assert len(replay.report) == 1
        recorder.batches.clear()
        strategy.train(benchmark.train_stream[1])
        assert len(replay.report) == 2
        images, labels = (torch.cat([b[part] for b in recorder.batches]) for part in (0, 1))
        assert sorted(labels.tolist()) == sorted([0, 1, 2, 3] * 3)
        order = labels.argsort(stable=True)
        kept = pixels_of(replay).flatten(1).sum(1).sort().values
        assert images[order].mul(255).round().flatten(1).sum(1).sort().values.equal(kept.float())
        assert {len(batch) for batch in recorder.batches} == {3 if kind == "nc" else 2}


def test_memory_only_keeps_task_labels() -> None:
    recorder, replay = Recorder(), KeepFirst(mode="memory_only")
    strategy = make_strategy([replay, recorder], model=make_multi_head_model())
    train(strategy, streams("nc_tasks").train_stream)
    tasks = torch.cat([batch[2] for batch in recorder.batches[-2:]])
    labels = torch.cat([batch[1] for batch in recorder.batches[-2:]])
    assert sorted(zip(tasks.tolist(), labels.tolist(), strict=True)) == sorted(
        (task, label) for task in (0, 1) for label in (0, 1) for _ in range(3)
    )


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("mode", ["replay", "memory_only"])
@pytest.mark.parametrize("given", [False, True])
def test_normalised_images_are_kept_and_replayed_in_their_own_spaces(
    mode: Any, given: bool
) -> None:
    normalise = transforms.Normalize(MEAN, STD)
    data = Images(transform=normalise)
    if given:
        data.transform = lambda image: normalise(image)
    seen: list[Tensor] = []

    def transform(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flip(3)

    recorder = Recorder()
    replay = KeepFirst(
        mode=mode,
        replay_transform=transform,
        normalization=(MEAN, STD) if given else None,
    )
    train(make_strategy([replay, recorder]), streams(data=data).train_stream)
    pixels = {image.numpy().tobytes() for image in data.pixels}
    assert {image.numpy().tobytes() for image in pixels_of(replay)} <= pixels
    assert len(seen) == (2 if mode == "memory_only" else 6)
    assert all(float(images.min()) >= 0 and float(images.max()) <= 1 for images in seen)
    replayed = recorder.batches[-1][0][-4:]
    known = {normalise(image.flip(2).float() / 255) for image in data.pixels}
    for image in replayed:
        assert min(float((image - other).abs().max()) for other in known) < 1e-5


def test_values_outside_0_1_are_told_before_training() -> None:
    data = Images(transform=lambda image: image * 4 - 2)
    strategy = make_strategy([KeepFirst()])
    before = weights(strategy)
    with pytest.raises(DataError, match=r"got \[.*no torchvision Normalize.*normalization=\(mean"):
        strategy.train(streams(data=data).train_stream[0])
    assert torch.equal(weights(strategy), before)


def test_a_normalisation_that_eval_transforms_do_not_apply_is_refused() -> None:
    normalise = transforms.Normalize(MEAN, STD)
    groups: Any = TransformGroups({"train": (normalise, None), "eval": (None, None)})
    data: Any = as_classification_dataset(Images(), transform_groups=groups)
    benchmark: Any = benchmark_from_datasets(train=[data])
    with pytest.raises(DataError, match="read images by the eval transforms, so give both the"):
        train(make_strategy([KeepFirst()]), benchmark.train_stream)
    replay = KeepFirst(normalization=(MEAN, STD))
    with pytest.raises(DataError, match=r"the eval transforms give images in \[0, 1\]: give these"):
        train(make_strategy([replay]), benchmark.train_stream)
    assert replay.memory is None


def test_images_of_a_stream_are_as_a_memory_has_them() -> None:
    data = Images(transform=transforms.Normalize(MEAN, STD))
    benchmark = streams(data=data)
    found = images_of(benchmark.train_stream)
    order = torch.tensor(data.targets).argsort(stable=True)
    assert found.images[found.labels.argsort(stable=True)].equal(data.pixels[order])
    first = images_of(benchmark.train_stream[0])
    assert first.classes.tolist() == [0, 1] and len(first) == 20
    assert images_of(list(benchmark.train_stream)[1:]).classes.tolist() == [2, 3]
    hidden = Images(transform=lambda image: transforms.Normalize(MEAN, STD)(image))
    assert images_of(streams(data=hidden).train_stream, (MEAN, STD)).images.equal(found.images)
    keys = images_of(streams("nc_tasks").train_stream).classes
    labels, tasks = split_class_keys(keys)
    assert labels.tolist() == [0, 1, 0, 1] and tasks.tolist() == [0, 0, 1, 1]


def test_lwf_is_the_only_one_that_distils() -> None:
    replay = KeepFirst()
    strategy = make_strategy([replay, LwFPlugin()])
    with pytest.warns(HMNReplayWarning, match="LwFPlugin distils the previous network"):
        train(strategy, streams().train_stream)
    assert replay.distill_used == 0.0
    asked = KeepFirst(distill=2.0)
    train(make_strategy([asked, LwFPlugin()]), streams().train_stream)
    assert asked.distill_used == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode must be one of"),
        ({"renew": "never"}, "renew must be one of auto, before, after"),
        ({"loss": "balance"}, "loss must be a callable or one of auto, .* mean 'balanced'"),
        ({"loss": nn.CrossEntropyLoss()}, "belongs in the strategy's criterion: leave loss out"),
        ({"replay_transform": "crop,flip"}, "a function of a batch of images, .*; got 'crop,flip'"),
        ({"replay_transform": transforms.Normalize(0.5, 0.5)}, "leave Normalize out of it"),
        (
            {"replay_transform": transforms.Compose([transforms.Normalize([0.5], [0.5])])},
            "leave Normalize out of it",
        ),
        ({"batch_size_mem": 0}, "batch_size_mem must be a whole number"),
        ({"max_raw_images": 1.5}, "max_raw_images must be a whole number"),
        ({"replay_weight": 1.5}, r"replay_weight must be None, or in \[0, 1\]"),
        ({"replay_weight": "x"}, r"replay_weight must be None, or in \[0, 1\]; got 'x'"),
        ({"recode_share": "x"}, r"recode_share must be in \[0, 1\]; got 'x'"),
        ({"label_weight": "x"}, "label_weight 0 or more; got 'hard' and 'x'"),
        ({"distill": "1"}, "distill must be None, 'adaptive', or 0 or more; got '1'"),
        ({"distill": float("inf")}, "distill must be None, 'adaptive', or 0 or more; got inf"),
        ({"tune_rate": None}, "tune_rate above 0; got 'none', 100 and None"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"normalization": ((0.5,), (0.0,))}, "above 0"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KeepFirst(**options)


def test_a_budget_is_no_keeper() -> None:
    with pytest.raises(ConfigError, match=r"got '3 KiB': for a budget alone take HMNReplay"):
        MemoryReplay("3 KiB")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"tune": "head"}, {"loss": "grouped"}])
def test_looking_for_the_head_leaves_the_random_state_alone(options: Any) -> None:
    def drawing(image: Tensor) -> Tensor:
        torch.rand(())
        return image

    replay = KeepFirst(**options)
    strategy = make_strategy([replay])
    strategy.experience = streams(data=Images(transform=drawing)).train_stream[0]
    replay.before_training(strategy)
    replay.before_train_dataset_adaptation(strategy)
    before = torch.get_rng_state()
    replay.before_training_exp(strategy)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("kind", ["nc", "ci", "datasets"])
def test_it_works_with_every_kind_of_benchmark(kind: str) -> None:
    replay = KeepFirst()
    strategy = make_strategy([replay], eval_every=1)
    train(strategy, streams(kind).train_stream, num_workers=0)
    assert replay.memory.labels.unique().tolist() == [0, 1, 2, 3]
    assert replay.memory_bytes == replay.memory.file_bytes
    strategy.eval(streams(kind).test_stream)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Naive, {"plugins": [LwFPlugin()]}),
        (Naive, {"plugins": [EWCPlugin(ewc_lambda=1.0)]}),
        (Naive, {"plugins": [ReplayPlugin(mem_size=8)]}),
        (ER_ACE, {"mem_size": 8, "batch_size_mem": 4}),
        (DER, {"mem_size": 12, "batch_size_mem": 4}),
    ],
    ids=["LwF", "EWC", "ReplayPlugin", "ER_ACE", "DER"],
)
@pytest.mark.parametrize("first", [True, False])
def test_it_works_with_other_methods(kind: Any, options: dict[str, Any], first: bool) -> None:
    options = copy.deepcopy(options)
    replay, recorder = KeepFirst(batch_size_mem=4, loss="plain"), Recorder()
    others = options.pop("plugins", [])
    plugins = [replay, *others] if first else [*others, replay]
    strategy = make_strategy([*plugins, recorder], kind, eval_every=1, **options)
    train(strategy, streams(num_experiences=4).train_stream)
    assert replay.memory.images_per_class == [3, 3, 3, 3]
    assert bool(weights(strategy).isfinite().all())
    assert set(recorder.batches[-1][1][-4:].tolist()) <= {0, 1, 2}


def test_the_mask_fits_where_der_puts_images_before_the_minibatch() -> None:
    sizes: list[tuple[int, int]] = []

    class Check(SupervisedPlugin[Any]):
        def after_forward(self, strategy: Any, **kwargs: Any) -> None:
            sizes.append((len(replay.replay_mask), len(strategy.mb_x)))

    replay = KeepFirst(batch_size_mem=3, loss="plain")
    check = Check()  # type: ignore[no-untyped-call]
    strategy = make_strategy([replay, check], DER, mem_size=8, batch_size_mem=4)
    train(strategy, streams().train_stream)
    assert sizes[-1] == (11, 11) and all(a == b for a, b in sizes)


def test_joint_training_leaves_a_memory_of_all_experiences() -> None:
    for mode in ("replay", "memory_only"):
        replay = KeepFirst(mode=mode)
        strategy = make_strategy([replay], JointTraining)
        strategy.train(streams(num_experiences=4).train_stream)
        assert replay.memory.images_per_class == [3, 3, 3, 3]
        assert len(replay.report) == 1 and len(replay.given[0]) == 40


def test_the_mask_marks_both_views_of_scr() -> None:
    sizes: list[tuple[int, int, int]] = []

    class Check(SupervisedPlugin[Any]):
        def before_forward(self, strategy: Any, **kwargs: Any) -> None:
            sizes.append((len(replay.replay_mask), len(strategy.mb_x), replay.last_replay_size))

        def after_forward(self, strategy: Any, **kwargs: Any) -> None:
            mask, labels = replay.replay_mask, strategy.mb_y
            sizes.append((len(mask), len(strategy.mb_x), replay.last_replay_size))
            assert int(mask.sum()) == replay.last_replay_size
            views = mask.view(2, -1)
            assert torch.equal(views[0], views[1])
            assert set(labels[views[0]].tolist()) <= {0, 1}

    replay = KeepFirst(batch_size_mem=5, loss="plain")
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    model = SCRModel(extractor, projection=nn.Linear(8, 4))
    check = Check()  # type: ignore[no-untyped-call]
    strategy = SCR(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
        mem_size=8,
        batch_size_mem=4,
        train_mb_size=8,
        plugins=[replay, check],
        evaluator=make_strategy().evaluator,
    )
    train(strategy, streams().train_stream)
    # 8 current images, 4 of SCR's own buffer, 5 of ours; twice after the augmentation.
    assert (17, 17, 5) in sizes and (34, 34, 10) in sizes
    assert all(mask == images for mask, images, _ in sizes)


def test_it_works_with_icarl() -> None:
    replay = KeepFirst(batch_size_mem=4, loss="plain")
    extractor = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    head = nn.Linear(8, 4)
    strategy = ICaRL(
        feature_extractor=extractor,
        classifier=head,
        optimizer=torch.optim.SGD([*extractor.parameters(), *head.parameters()], lr=0.05),
        memory_size=8,
        buffer_transform=None,
        fixed_memory=True,
        train_mb_size=8,
        eval_mb_size=8,
        plugins=[replay],
        evaluator=make_strategy().evaluator,
    )
    train(strategy, streams().train_stream)
    assert replay.memory.images_per_class == [3, 3, 3, 3]


@pytest.mark.parametrize(
    "head", [CosineLinear(16, 4), IncrementalClassifier(16), CosineIncrementalClassifier(16)]
)
def test_it_works_with_other_heads(head: nn.Module) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), copy.deepcopy(head))
    strategy = make_strategy([KeepFirst()], model=model)
    train(strategy, streams().train_stream)
    strategy.eval(streams().test_stream)
    assert bool(weights(strategy).isfinite().all())


@pytest.mark.parametrize("kind", ["nc", "ci"])
def test_renewed_before_training_images_of_all_classes_are_replayed(kind: str) -> None:
    replay, recorder = KeepFirst(batch_size_mem=12), Recorder()
    strategy = make_strategy([replay, recorder])
    for number, experience in enumerate(streams(kind).train_stream):
        recorder.batches.clear()
        strategy.train(experience)
        assert len(replay.report) == number + 1  # once, not again after training
        replayed = 6 * (number + 1)
        assert all(len(batch[0]) - replayed in (8, 4) for batch in recorder.batches)
        for batch in recorder.batches:
            assert sorted(batch[1][-replayed:].tolist()) == sorted([*range(2 * number + 2)] * 3)
    assert replay.renew_used == "before" and replay.loss_used == "separated"


def test_classes_that_come_again_are_replayed_as_they_are_renewed() -> None:
    replay, recorder = KeepFirst(batch_size_mem=100), Recorder()
    train(make_strategy([replay, recorder]), labelled_streams((0, 1), (1, 2), (0, 1)).train_stream)
    assert sorted(recorder.batches[-1][1][-9:].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [images.classes.tolist() for images in replay.given] == [[0, 1], [1, 2], [0, 1]]


@pytest.mark.parametrize("options", [{}, {"renew": "before"}, {"loss": "separated"}])
def test_pieces_are_made_into_the_memory_after_training_whatever_was_asked_for(
    options: dict[str, Any],
) -> None:
    online = in_pieces(streams().train_stream, 5, access_task_boundaries=True)
    replay = KeepFirst(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(make_strategy([replay]), online)
    told = [str(each.message) for each in caught if "in pieces" in str(each.message)]
    assert len(told) == len(options)
    assert all('renew="after", and so loss="balanced"' in message for message in told)
    assert (replay.renew_used, replay.loss_used) == ("after", "balanced")
    assert replay.report[0]["renew_used"] == "after" and not replay.finish()


def test_two_plugins_that_replay_are_refused() -> None:
    strategy = make_strategy([KeepFirst(), RawReplay(3000)])
    with pytest.raises(ConfigError, match="a strategy has two plugins that replay from a memory"):
        strategy.train(streams().train_stream[0])


def test_a_network_saved_in_training_has_no_teacher_in_it() -> None:
    class Saver(SupervisedPlugin[Any]):
        def after_training_epoch(self, strategy: Any, **_: Any) -> None:
            file = io.BytesIO()
            torch.save(strategy.model, file)
            self.saved = file.getvalue()

    saver = Saver()  # type: ignore[no-untyped-call]
    replay = KeepFirst(distill=1.0)
    train(make_strategy([replay, saver]), streams().train_stream)
    assert replay.distill_used == 1
    restored = torch.load(io.BytesIO(saver.saved), weights_only=False)
    plain = io.BytesIO()
    torch.save(make_model(), plain)
    assert len(saver.saved) < len(plain.getvalue()) + 2000
    assert restored(torch.rand(2, *SHAPE)).shape == (2, 4)


def test_a_domain_that_comes_later_leaves_images_of_the_first() -> None:
    data: list[Any] = [
        as_classification_dataset(Images((0, 1))),
        as_classification_dataset(Dark((0, 1))),
    ]
    replay = RawReplay(3000)
    benchmark: Any = benchmark_from_datasets(train=data)
    train(make_strategy([replay]), benchmark.train_stream)
    assert replay.memory is not None
    images, labels = replay.memory.decode()
    for label in (0, 1):
        dark = images[labels == label].mean(dim=(1, 2, 3)) < 0.05
        assert 0 < abs(int(dark.sum()) - int((~dark).sum())) + 1 <= 2


def test_a_head_that_is_needed_is_asked_for_before_anything_is_made() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten())
    for replay in (KeepFirst(loss="grouped"), KeepFirst(tune="head")):
        with pytest.raises(ConfigError, match=r"has no nn\.Linear, which would be its head"):
            make_strategy([replay], model=model).train(streams().train_stream[0])
        assert replay.memory is None


def test_constants_of_a_normalisation_serve_training_too() -> None:
    normalization = Normalization((0.31, 0.32, 0.33), (0.21, 0.22, 0.23))
    with torch.inference_mode():
        normalization.apply(torch.rand(2, *SHAPE))
    images = torch.rand(2, *SHAPE, requires_grad=True)
    normalization.apply(images * 2).sum().backward()
    assert images.grad is not None


def test_joint_training_may_have_its_memory_before() -> None:
    replay, recorder = KeepFirst(renew="before", batch_size_mem=12), Recorder()
    make_strategy([replay, recorder], JointTraining).train(streams().train_stream)
    assert len(replay.report) == 1 and replay.loss_used == "separated"
    assert sorted(recorder.batches[0][1][-12:].tolist()) == sorted([0, 1, 2, 3] * 3)
    by_itself = KeepFirst()
    make_strategy([by_itself], JointTraining).train(streams().train_stream)
    assert by_itself.renew_used == "after"


def test_an_experience_without_a_loss_of_ours_may_be_renewed_before() -> None:
    replay, recorder = KeepFirst(renew="before", loss="plain", batch_size_mem=4), Recorder()
    model = make_multi_head_model()
    train(make_strategy([replay, recorder], model=model), streams("nc_tasks").train_stream)
    assert replay.renew_used == "before" and replay.loss_used == "plain"
    tasks = torch.cat([batch[2][-4:] for batch in recorder.batches[-3:]])
    assert set(tasks.tolist()) == {0, 1}
    automatic = KeepFirst()
    with pytest.warns(HMNReplayWarning, match="task labels above 0"):
        train(
            make_strategy([automatic], model=make_multi_head_model()),
            streams("nc_tasks").train_stream,
        )
    assert (automatic.renew_used, automatic.loss_used) == ("after", "plain")


@pytest.mark.parametrize(("size", "drop_last"), [(7, True), (7, False), (5, True), (1, False)])
def test_online_pieces_are_condensed_where_their_experience_ends(
    size: int, drop_last: bool
) -> None:
    stream = streams(data=Images(each=20)).train_stream
    online = in_pieces(stream, size, access_task_boundaries=True, drop_last=drop_last)
    replay = KeepFirst(batch_size_mem=2)
    train(make_strategy([replay]), online)
    # The first 40 images are those of classes 0 and 1, the others come from the second.
    left_out = 40 % size if drop_last else 0
    assert [images.classes.tolist() for images in replay.given] == [[0, 1], [2, 3]]
    assert [len(images) for images in replay.given] == [40 - left_out] * 2
    assert replay.num_pending == 0 and not replay.finish()
    assert [entry["images_per_class"] for entry in replay.report] == [[3, 3], [3, 3, 3, 3]]


def test_what_pieces_have_left_is_condensed_before_a_whole_experience() -> None:
    first, second = streams(data=Images(each=20)).train_stream
    replay = KeepFirst(batch_size_mem=2)
    strategy = make_strategy([replay])
    *pieces, _ = in_pieces([first], 7, access_task_boundaries=True)  # it is broken off
    train(strategy, pieces)
    assert replay.num_pending > 0
    strategy.train(second)
    assert replay.renew_used == "before" and replay.num_pending == 0
    assert [images.classes.tolist() for images in replay.given] == [[0, 1], [2, 3]]


def test_pieces_of_a_stream_that_hides_its_borders_are_condensed_by_number() -> None:
    online = list(in_pieces(streams(data=Images(each=15)).train_stream, 5))
    replay = KeepFirst(max_raw_images=20)
    strategy = make_strategy([replay])
    with pytest.warns(UserWarning, match="hides where an experience ends.*max_raw_images=20"):
        strategy.train(online[0])
    train(strategy, online[1:])  # and it warns once
    assert [len(images) for images in replay.given] == [20, 20, 20]
    assert replay.num_pending == 0 and not replay.finish()
    assert replay.memory.labels.unique().tolist() == [0, 1, 2, 3]


def test_an_online_stream_given_at_once_is_condensed_in_the_end() -> None:
    benchmark = streams(data=Images(each=20))
    replay = KeepFirst()
    strategy = make_strategy([replay])
    for experience in benchmark.train_stream:
        strategy.train(in_pieces([experience], 8))
        assert replay.num_pending == 0
    assert [each.class_indices.bincount().tolist() for each in replay.given] == [[20, 20]] * 2


def test_pieces_given_at_once_whose_borders_are_hidden_are_condensed_by_number_too() -> None:
    replay = KeepFirst(max_raw_images=20, batch_size_mem=3)
    strategy = make_strategy([replay])
    strategy.train(list(in_pieces(streams(data=Images(each=20)).train_stream, 8)))
    # 24 of the 40 images of an experience are over 20, of which 20 are kept.
    assert [len(images) for images in replay.given] == [20, 20, 20, 8]
    assert replay.num_pending == 0


def test_the_last_piece_that_says_so_ends_an_experience() -> None:
    online = in_pieces(streams().train_stream, 7, access_task_boundaries=True, drop_last=False)
    replay = KeepFirst()
    train(make_strategy([replay]), online)
    assert len(replay.given) == 2 and replay.num_pending == 0


def test_memory_only_refuses_pieces() -> None:
    online = in_pieces(streams().train_stream, 5)
    with pytest.raises(ConfigError, match="online stream gives it in pieces"):
        train(make_strategy([KeepFirst(mode="memory_only")]), online)


def test_labels_may_be_any_integers() -> None:
    class Remap(nn.Module):
        def forward(self, output: Tensor, labels: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output, labels.remainder(4))

    replay, recorder = KeepFirst(batch_size_mem=6, loss="plain"), Recorder()
    benchmark = labelled_streams((-5, 3), (700, 1_000_002))
    train(make_strategy([replay, recorder], criterion=Remap()), benchmark.train_stream)
    assert replay.memory.labels.unique().tolist() == [-5, 3, 700, 1_000_002]
    assert set(recorder.batches[-1][1][-6:].tolist()) == {-5, 3}


def test_images_of_another_size_than_the_minibatch_are_refused() -> None:
    replay = KeepFirst(renew="after")
    strategy = make_strategy([replay])
    strategy.train(streams().train_stream[0])
    small = torch.zeros(4, 3, 8, 9, dtype=torch.uint8)
    replay.memory = raw_memory(small, torch.arange(4))
    with pytest.raises(DataError, match="must give the size that the eval transforms give"):
        strategy.train(streams().train_stream[1])


@pytest.mark.parametrize("mode", ["replay", "memory_only"])
def test_a_transform_may_draw_from_the_global_generators(mode: Any) -> None:
    shown: list[Tensor] = []

    def noisy(images: Tensor) -> Tensor:
        shown.append(torch.rand(()) + random.random() + np.random.random())
        return images + 0.1 * torch.rand_like(images)

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        strategy = make_strategy([KeepFirst(batch_size_mem=4, mode=mode, **options)])
        train(strategy, streams().train_stream)
        return weights(strategy), torch.rand(())

    plain, after_plain = run()
    drawn, after_drawn = run(replay_transform=noisy)
    again, _ = run(replay_transform=noisy)
    half = len(shown) // 2
    assert shown[:half] == shown[half:] and len({float(each) for each in shown[:half]}) == half
    assert after_drawn.equal(after_plain)  # nothing was drawn from the caller's
    assert drawn.equal(again) and not drawn.equal(plain)


@pytest.mark.parametrize(
    "change", [lambda x: x[:, :, :4], lambda x: (255 * x).byte(), lambda x: x.double()]
)
def test_a_transform_that_changes_shape_or_type_is_refused(change: Any) -> None:
    strategy = make_strategy([KeepFirst(replay_transform=change)])
    with pytest.raises(DataError, match=r"replay_transform returned torch.* for torch.float32 \("):
        train(strategy, streams().train_stream)


def test_float64_minibatches_get_float64_images() -> None:
    recorder, model = Recorder(), make_model().double()
    data = Images(transform=lambda image: image.double())
    replay = KeepFirst(batch_size_mem=3)
    train(make_strategy([replay, recorder], model=model), streams(data=data).train_stream)
    images = recorder.batches[-1][0]
    assert images.dtype == torch.float64 and len(images) == 4 + 3
    # The values of uint8 pixels in float64, rather than those of float32.
    scaled = images[-3:] * 255
    assert float((scaled - scaled.round()).abs().max()) < 1e-12


def test_integer_minibatches_are_refused() -> None:
    class ToFloat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.float().div(255)

    data = Images(transform=lambda image: image.mul(255).byte())
    model = nn.Sequential(ToFloat(), make_model())
    with pytest.raises(DataError, match="expected a mini-batch of floats"):
        train(make_strategy([KeepFirst()], model=model), streams(data=data).train_stream)


def test_a_set_memory_is_replayed() -> None:
    replay, recorder = KeepFirst(batch_size_mem=2, renew="after"), Recorder()
    replay.memory = raw_memory(torch.zeros(4, *SHAPE, dtype=torch.uint8), torch.zeros(4).long())
    make_strategy([replay, recorder]).train(streams().train_stream[1])
    assert all(int(batch[0][-2:].count_nonzero()) == 0 for batch in recorder.batches)


def test_the_report_says_what_each_update_did() -> None:
    replay = KeepFirst()
    train(make_strategy([replay]), streams().train_stream)
    assert [entry["update"] for entry in replay.report] == [0, 1]
    first = replay.report[0]
    assert first["images_per_class"] == [3, 3] and first["num_images"] == 6
    assert first["file_bytes"] > 6 * 192 and first["seconds"] >= 0
    assert first["index"] == 0
    assert (first["loss_used"], first["renew_used"]) == ("separated", "before")
    # Seeded draws inside an update differ from one to the next.
    assert first["draw"] != replay.report[1]["draw"]


def test_a_state_goes_on_with_the_same_bits() -> None:
    stream = streams(data=Images(each=15)).train_stream
    online = list(in_pieces(stream, 5, access_task_boundaries=True))
    replay = KeepFirst(batch_size_mem=3, max_raw_images=12)
    # Without momentum: a new strategy of Avalanche's starts its optimizer anew.
    model = make_model()
    strategy = make_strategy(
        [replay], model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    train(strategy, online[:8])
    resumed = KeepFirst(batch_size_mem=3, max_raw_images=12)
    resumed.load_state_dict(replay.state_dict())
    model = copy.deepcopy(strategy.model)
    other = make_strategy(
        [resumed], model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    assert replay.num_pending == resumed.num_pending > 0
    for going, plugin in ((strategy, replay), (other, resumed)):
        train(going, online[8:], seed=1)
        plugin.finish()
    assert torch.equal(weights(strategy), weights(other))
    assert torch.equal(pixels_of(replay), pixels_of(resumed))
    drop = [{**entry, "seconds": 0} for entry in replay.report]
    assert drop == [{**entry, "seconds": 0} for entry in resumed.report]


@pytest.mark.parametrize("tune", ["none", "all"])
def test_a_plugin_that_goes_back_to_a_state_goes_on_as_a_new_one(tune: Any) -> None:
    first, second, third = labelled_streams([0], [1], [2]).train_stream
    options: dict[str, Any] = {"batch_size_mem": 3, "tune": tune, "tune_steps": 2}
    replay = KeepFirst(**options)
    strategy = make_strategy([replay])
    train(strategy, [first, second])
    state, model = copy.deepcopy(replay.state_dict()), copy.deepcopy(strategy.model)
    train(strategy, [third])
    found = []
    replay.load_state_dict(copy.deepcopy(state))
    fresh = KeepFirst(**options)
    fresh.load_state_dict(copy.deepcopy(state))
    for plugin in (replay, fresh):
        going = make_strategy([plugin], model=copy.deepcopy(model))
        train(going, [third], seed=1)
        assert plugin.distill_used == 1.0
        found.append(weights(going))
    assert torch.equal(*found)


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    online = list(in_pieces(streams().train_stream, 5, access_task_boundaries=True))
    replay = KeepFirst()
    train(make_strategy([replay]), online[:-1])
    assert replay.num_pending and len(replay.report) == 1
    memory, pending = replay.memory, replay.num_pending

    def flipped(values: Tensor) -> Tensor:
        values = values.clone()
        values.view(-1)[-1] += 1
        return values

    state = replay.state_dict()
    broken: list[Any] = [
        None,
        [1],
        [],
        {},
        {**state, "version": 9},
        {**state, "report": "[]"},
        {**state, "num_draws": 9},
    ]
    broken += [{**state, "memory": flipped(state["memory"])}, {**state, "memory": b"bytes"}]
    broken += [{**state, "more": 1}, {k: v for k, v in state.items() if k != "num_updates"}]
    broken += [
        {**state, "pending": {**state["pending"], name: flipped(values)}}
        for name, values in state["pending"].items()
        if name != "class_names"
    ]
    broken += [{**state, "pending": {**state["pending"], "class_names": {0: "cat"}}}]
    with pytest.raises(CheckpointError, match="it is that of a ReplayMemory"):
        replay.load_state_dict(replay.store.state_dict())
    with pytest.raises(CheckpointError, match="it is that of a plugin, such as HMNReplay"):
        replay.store.load_state_dict(state)
    for wrong in broken:
        with pytest.raises(CheckpointError, match="not a whole state of a replay memory"):
            replay.load_state_dict(wrong)
        assert replay.memory is memory and len(replay.report) == 1
        assert replay.num_pending == pending
    with pytest.raises(CheckpointError, match="version 9, expected"):
        replay.load_state_dict({**state, "version": 9, "training_digest": "of that version"})
    replay.load_state_dict(state)


def test_minibatches_of_integers_are_refused() -> None:
    data = Images(transform=lambda image: image.mul(255).to(torch.uint8))
    with pytest.raises(DataError, match=r"a mini-batch of floats, got torch\.uint8"):
        make_strategy([KeepFirst(renew="before")]).train(streams(data=data).train_stream[0])


def test_items_of_another_form_are_refused() -> None:
    features: Any = TensorDataset(torch.rand(20, 6), torch.arange(20) % 2)
    features.targets = features.tensors[1].tolist()
    with pytest.raises(DataError, match="image 0 of the experience"):
        make_strategy([KeepFirst()]).train(streams(data=features).train_stream[0])


def test_every_plugin_takes_the_same_options() -> None:
    options = set(ReplayOptions.__annotations__)
    assert options | {"keeper"} == set(inspect.signature(MemoryReplay).parameters)
    given: Any = dict.fromkeys(("batch_size_mem", "max_raw_images", "seed"), 7)
    plugins: tuple[Any, ...] = (HMNReplay, RawReplay, JPEGReplay)
    for make in plugins:
        replay = make("1 KiB", **given)
        assert (replay.batch_size_mem, replay.max_raw_images, replay.seed) == (7, 7, 7)
        with pytest.raises(TypeError, match=r"'batch_size_memory'.*did you mean 'batch_size_mem'"):
            make("1 KiB", batch_size_memory=3)
        with pytest.raises(TypeError, match=r"'mem_size'; a memory is bounded by its budget"):
            make("1 KiB", mem_size=3)

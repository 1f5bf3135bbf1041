"""The report on the shortcut, with networks that are known to take it or not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hmn_replay import LabelledImages, jpeg_images, raw_images, shortcut_report
from hmn_replay.errors import ConfigError, DataError
from hmn_replay.memory import HierarchicalMemory, PixelMemory
from hmn_replay.runtime import seeded
from tests.support import hmn_layout

NEW = [2, 3]


def noisy_set(each: int = 24, seed: int = 0, image_size: int = 16) -> LabelledImages:
    """Return four classes, a level of brightness each, with fine noise that JPEG takes away."""
    labels = torch.arange(4).repeat(each)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-24, 25, (len(labels), 3, image_size, image_size), generator=generator)
    images = (40 + 50 * labels).view(-1, 1, 1, 1) + noise
    return LabelledImages(images.to(torch.uint8), labels)


class Bright(nn.Module):
    """Knows the classes by their brightness; calls what has fine noise new, if it is a cheat."""

    def __init__(self, cheats: bool) -> None:
        super().__init__()
        self.cheats = cheats
        self.features = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.features.weight)

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3)) * 255
        noise = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3)) * 255
        rows = self.features(torch.stack([level, noise], dim=1))
        logits: Tensor = -(rows[:, :1] - torch.tensor([40.0, 90.0, 140.0, 190.0])).abs()
        if self.cheats:
            logits = logits + 1000 * (rows[:, 1:] > 8) * torch.tensor([0.0, 0.0, 1.0, 1.0])
        return logits


def test_a_network_that_calls_clean_images_new_is_found_out() -> None:
    memory = jpeg_images(noisy_set(), "100 KiB", quality=5)
    test_set = noisy_set(seed=1)
    report = shortcut_report(Bright(cheats=True), memory, test_set, new_classes=NEW)
    assert report["num_old_classes"] == report["num_new_classes"] == 2
    assert report["balanced_share"] == 0.5
    assert report["clean"] == {"accuracy": 0, "called_new": 1}
    assert report["codec"] == report["decoded"] == {"accuracy": 1, "called_new": 0}
    assert report["probe"]["decoded"] > 0.9 and report["probe"]["codec"] > 0.9
    assert json.loads(json.dumps(report)) == report
    honest = shortcut_report(Bright(cheats=False), memory, test_set, new_classes=NEW)
    assert honest["clean"] == honest["codec"] == {"accuracy": 1, "called_new": 0}


def test_lossless_images_are_no_different() -> None:
    memory = raw_images(noisy_set(), "100 KiB")
    report = shortcut_report(Bright(False), memory, noisy_set(seed=1), new_classes=NEW)
    assert report["codec"] == report["clean"]
    assert all(abs(accuracy - 0.5) < 0.3 for accuracy in report["probe"].values())


def test_clean_images_go_through_hmns_codec_too() -> None:
    memory = HierarchicalMemory(hmn_layout((3, 16, 16)), [0, 1, 2, 3], [8] * 4)
    report = shortcut_report(Bright(True), memory, noisy_set(), new_classes=NEW)
    given = shortcut_report(
        Bright(True), memory, noisy_set(), new_classes=NEW, codec=memory.codec()
    )
    assert report == given and report["codec"] is not None
    assert report["probe"]["codec"] > 0.9, "an untrained decoder changes images very much"


def test_a_memory_without_a_codec_shows_none_unless_one_is_given() -> None:
    layout = PixelMemory.choose_layout("100 KiB", (3, 16, 16), 4)
    memory = PixelMemory(layout, [0, 1, 2, 3], [8] * 4)
    assert not memory.has_codec and memory.codec() is None
    report = shortcut_report(Bright(True), memory, noisy_set(), new_classes=NEW)
    assert report["codec"] is report["probe"]["codec"] is None
    assert report["decoded"] is not None and 0 <= report["probe"]["decoded"] <= 1

    def blur(images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3), keepdim=True).expand(images.shape).to(torch.uint8)

    report = shortcut_report(Bright(True), memory, noisy_set(), new_classes=NEW, codec=blur)
    assert report["codec"] == {"accuracy": 1, "called_new": 0}
    with pytest.raises(ConfigError, match=r"the codec returned torch\.float32"):
        shortcut_report(Bright(True), None, noisy_set(), new_classes=NEW, codec=Tensor.float)


def test_any_strategy_and_no_memory_will_do_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Bright(False)).train()
    state = torch.get_rng_state()
    strategy = SimpleNamespace(model=model)
    report = shortcut_report(strategy, None, noisy_set(), new_classes=NEW, transform=nn.Identity())
    assert report["clean"]["accuracy"] == 1
    assert report["decoded"] is report["codec"] is report["probe"]["decoded"] is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_classes_that_the_memory_does_not_have_yet_are_not_old() -> None:
    first = noisy_set().take(noisy_set().labels < 3)
    memory = raw_images(first, "100 KiB")
    report = shortcut_report(Bright(True), memory, noisy_set(seed=1), new_classes=[2])
    assert report["num_old_classes"] == 2 and report["num_new_classes"] == 1
    known = noisy_set(seed=1).take(noisy_set(seed=1).labels < 3)
    assert report == shortcut_report(Bright(True), memory, known, new_classes=[2])


def test_new_classes_that_are_nowhere_are_refused() -> None:
    memory = raw_images(noisy_set(), "100 KiB")
    with pytest.raises(ConfigError, match="the memory or the test set has; 99 is none"):
        shortcut_report(Bright(True), memory, noisy_set(seed=1), new_classes=[2, 99])


def test_images_are_normalised_as_the_strategys_plugin_has_found() -> None:
    normalization = SimpleNamespace(apply=lambda images: (images - 0.5) / 0.25)

    class Normalised(Bright):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * 0.25 + 0.5)

    plugins = [SimpleNamespace(), SimpleNamespace(found_normalization=normalization)]
    strategy = SimpleNamespace(model=Normalised(False), plugins=plugins)
    report = shortcut_report(strategy, None, noisy_set(), new_classes=NEW)
    assert report["clean"]["accuracy"] == 1
    buffer = SimpleNamespace(replay=plugins[1])
    plugins[1] = SimpleNamespace(storage_policy=buffer)
    assert shortcut_report(strategy, None, noisy_set(), new_classes=NEW) == report
    del strategy.plugins
    strategy.storage_policy = buffer
    assert shortcut_report(strategy, None, noisy_set(), new_classes=NEW) == report
    bare = shortcut_report(strategy.model, None, noisy_set(), new_classes=NEW)
    assert bare["clean"]["accuracy"] < 1


class HeadFirst(nn.Module):
    """Registers its head first, and a layer that is never called last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 4), nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
        self.unused = nn.Linear(9, 9)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images).relu())
        return logits


def test_features_are_what_the_head_takes_in_wherever_it_is_registered() -> None:
    with seeded(0):
        model = HeadFirst()
    memory, test_set = jpeg_images(noisy_set(), "100 KiB", quality=5), noisy_set(seed=1)
    ordered = nn.Sequential(model.body, nn.ReLU(), model.head)
    report = shortcut_report(model, memory, test_set, new_classes=NEW)
    assert report == shortcut_report(ordered, memory, test_set, new_classes=NEW)


def test_without_old_or_new_classes_there_is_nothing_to_measure() -> None:
    with pytest.raises(DataError, match="no image of an old class"):
        shortcut_report(Bright(False), None, noisy_set(), new_classes=[0, 1, 2, 3])
    with pytest.raises(ConfigError, match="new_classes must have one label or more"):
        shortcut_report(Bright(False), None, noisy_set(), new_classes=[])


def test_labels_are_a_list_and_the_network_has_one_head() -> None:
    with pytest.raises(ConfigError, match="new_classes is a list of labels; got 1"):
        shortcut_report(Bright(True), None, noisy_set(), new_classes=1)  # type: ignore[arg-type]
    pytest.importorskip("avalanche")
    from avalanche.models import SimpleMLP
    from avalanche.models.helper_method import as_multitask

    multi = as_multitask(SimpleMLP(num_classes=2, input_size=4), "classifier")
    with pytest.raises(ConfigError, match=r"of networks with one head; .* one for each task"):
        shortcut_report(multi, None, noisy_set(), new_classes=NEW)

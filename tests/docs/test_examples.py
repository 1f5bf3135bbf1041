"""The code of pages on other hosts runs, block after block, as it is printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import hmn_replay
from tests.docs.pages import DOCS, blocks, run_blocks
from tests.hub import Hub
from tests.streams import streams

pytestmark = pytest.mark.usefixtures("quick")

HOSTS = ("models.er", "avalanche", "timm-pretrained", "torchrl")


def run_page(name: str, host: str = "", **more: Any) -> dict[str, Any]:
    """Run the blocks of a page in one namespace: those that name a host, or none of them."""

    def is_wanted(block: str) -> bool:
        return host in block and not any(other in block for other in HOSTS if other != host)

    return run_blocks([block for block in blocks(DOCS / name) if is_wanted(block)], **more)


def test_replay_in_a_loop_of_ones_own() -> None:
    names = run_page("replay.md")
    assert Path("seen.hmn").stat().st_size <= 2048
    assert hmn_replay.load("seen.hmn").num_classes == 10
    assert names["memory"].memory.num_classes == 5
    assert torch.load("replay.pt", weights_only=True)["num_updates"] == 2


@pytest.mark.filterwarnings("ignore:the budget of .* is planned for")
def test_mammoths_model_gets_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Er:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.buffer: Any = None
            self.device = torch.device("cpu")

    models: Any = ModuleType("models.er")
    models.Er = Er
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.er", models)
    model = run_page("replay.md", "models.er")["ErHmn"](None, None, None, None)
    data = hmn_replay.load_dataset("digits")
    model.buffer.add_data(data.images[:60] / 255, data.labels[:60])
    assert model.buffer.is_empty()
    model.end_task(None)
    images, labels = model.buffer.get_data(8)
    assert images.shape == (8, 1, 8, 8) and labels.dtype == torch.int64
    other = run_page("replay.md", "models.er")["ErHmn"](None, None, None, None)
    other.load_buffer(model.buffer.serialize())
    assert len(other.buffer) == len(model.buffer) > 0


@pytest.mark.filterwarnings("ignore")  # torchrl's own
def test_torchrls_buffer_has_what_the_memory_decodes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torchrl's own buffer where it is installed, else in one of as many methods."""
    if find_spec("torchrl") is None:
        for name, content in torchrl_stand_ins().items():
            module: Any = ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
    names = run_page("replay.md", "torchrl")
    memory, batch = names["memory"].memory, names["batch"]
    assert memory.num_classes == 10 and len(names["buffer"]) == memory.num_images
    pairs = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(*memory.decode(dtype=torch.uint8), strict=True)
    }
    assert batch["image"].shape == (32, 1, 8, 8)
    drawn = zip(batch["image"], batch["label"].tolist(), strict=True)
    assert all((image.numpy().tobytes(), label) in pairs for image, label in drawn)


def torchrl_stand_ins() -> dict[str, dict[str, Any]]:
    """Return what the page imports of torchrl and tensordict, by module."""

    class TensorDict(dict[str, torch.Tensor]):
        def __init__(self, values: Mapping[str, torch.Tensor], batch_size: int) -> None:
            super().__init__(values)
            assert all(len(value) == batch_size for value in values.values())

    class Buffer:
        def __init__(self, *, storage: int, sampler: object, batch_size: int) -> None:
            self.most, self.batch_size, self.held = storage, batch_size, TensorDict({}, 0)

        def empty(self) -> None:
            self.held = TensorDict({}, 0)

        def extend(self, values: TensorDict) -> None:
            assert not self.held and len(next(iter(values.values()))) <= self.most
            self.held = values

        def sample(self) -> TensorDict:
            chosen = torch.randperm(len(self))[: self.batch_size]
            return TensorDict({k: v[chosen] for k, v in self.held.items()}, self.batch_size)

        def __len__(self) -> int:
            return len(self.held["label"])

    return {
        "tensordict": {"TensorDict": TensorDict},
        "torchrl": {},
        "torchrl.data": {"LazyTensorStorage": int, "TensorDictReplayBuffer": Buffer},
        "torchrl.data.replay_buffers": {"SamplerWithoutReplacement": object},
    }


def test_memories_are_shared_and_shown(hub: Hub) -> None:
    pytest.importorskip("datasets", reason="needs the extra hub")
    names = run_page("sharing.md")
    assert Path("stream.html").read_text().count("<figcaption>experience 1 · ") == 10
    assert 0 < len(hub.repositories["someone/digits-4k"]["memory.hmn"]) <= 4096
    assert names["again"].file_bytes <= 2048


def test_folders_of_large_pictures_become_a_file_and_a_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for number, label in enumerate(("church", "tench", "truck")):
            folder = Path("imagenette2", split, label)
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(80 * number, 80 * number + 80, (40, 36), generator=generator)
                picture = Image.fromarray(pixels.to(torch.uint8).numpy()).convert("RGB")
                picture.resize((72, 80)).save(folder / f"{i}.jpg")
    smaller = {"size=224": "size=48", "1 MB": "12 KB", "width=64": "width=4, num_passes=24"}
    names = run_page("large-images.md", replace=smaller)
    assert names["train"].image_shape == (3, 48, 48) == names["memory"].image_shape
    assert names["memory"].class_names == {0: "church", 1: "tench", 2: "truck"}
    assert Path("imagenette.hmn").stat().st_size <= 12_000
    assert names["images"].shape[1:] == (3, 48, 48) and names["stream"].memory.num_classes == 3


def test_features_become_a_file_and_a_stream() -> None:
    monkey = {"num_passes=4000": "num_passes=2000", "range(200)": "range(60)"}
    names = run_page("features.md", replace=monkey)
    assert Path("digits-features.hmn").stat().st_size <= 4096
    assert hmn_replay.load("digits-features.hmn").holds_features
    assert names["accuracy"] > 0.7 and names["accuracy_of_stream"] > 0.5
    assert names["replay"].memory.num_classes == 10 and names["replay"].memory_bytes <= 4096


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_features_are_replayed_inside_avalanche() -> None:
    names = run_page("features.md", "avalanche", given=backbone_and_benchmark())
    assert names["replay"].memory.holds_features and names["replay"].memory.num_classes == 4


def test_features_are_made_by_a_network_of_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    data = hmn_replay.LabelledImages(
        torch.randint(256, (30, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte(),
        torch.arange(30) % 3,
    )
    monkeypatch.setattr(hmn_replay, "load_dataset", lambda *_, **__: data)
    names = run_page(
        "features.md",
        "timm-pretrained",
        replace={"timm-pretrained:resnet18": "timm:test_resnet", '"100 KB"': '"8 KB"'},
    )
    assert names["memory"].num_classes == 3 and Path("imagenette-features.hmn").exists()


def backbone_and_benchmark() -> dict[str, Any]:
    """Return what the page has before: a frozen backbone, and a stream of experiences."""
    network = torch.nn.Conv2d(3, 6, 4, 4)
    backbone = hmn_replay.FrozenBackbone(network, (3, 8, 8))
    return {
        "hmn_replay": hmn_replay,
        "torch": torch,
        "backbone": backbone,
        "benchmark": streams(),
    }


@pytest.mark.filterwarnings("ignore")  # Avalanche's own
def test_an_objective_and_a_pruning_of_ones_own() -> None:
    own, pruned, *_ = blocks(DOCS / "objectives.md")[-4:]
    try:
        names = run_blocks([own, pruned])
    finally:
        hmn_replay.OBJECTIVES.remove("mean-image")
    assert names["memory"].report["pruning"].endswith("distance_to_mean")
    assert names["memory"].file_bytes <= 4096


def test_memory_kinds_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"hmn_replay": hmn_replay, "torch": torch}
    given["digits"] = hmn_replay.load_dataset("digits", "train")
    smaller = {'effort="draft"': 'effort="draft", warm_start_steps=100, outer_steps=0'}
    try:
        names = run_blocks(blocks(DOCS / "objectives.md")[-2:], smaller, given)
        memory = names["memory"]
        assert memory.kind == "sketch" and memory.file_bytes <= 4096
        assert memory.report["warm_start_psnr"] > 14
        assert hmn_replay.load("seen.hmn").decode()[0].equal(names["replay"].memory.decode()[0])
    finally:
        for kind in ("sketch", "zlib"):
            hmn_replay.MEMORIES.remove(kind)


def test_memories_are_watched() -> None:
    pytest.importorskip("tensorboard", reason="Avalanche's logger needs it")
    evaluator = run_page("sharing.md", "avalanche")["evaluator"]
    assert any("Memory_bytes" in str(metric) for metric in evaluator.metrics)

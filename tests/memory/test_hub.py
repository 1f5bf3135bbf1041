"""Memories on the Hugging Face Hub and as its data sets; against a server on the loopback."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import hmn_replay
from hmn_replay.cli import main
from hmn_replay.errors import (
    BudgetError,
    ConfigError,
    DataError,
    MemoryFileError,
    MissingExtraError,
)
from tests.hub import Hub
from tests.support import any_memory, real

NAME = "someone/stripes"


@pytest.mark.parametrize("kind", ["hmn", "jpeg"])
def test_what_was_put_there_comes_back(kind: str, hub: Hub) -> None:
    memory = any_memory(kind)
    address = memory.push_to_hub(NAME, private=True, token="hf_secret")
    assert address.startswith(hub.url) and "/commit/" in address
    assert hub.created[0]["type"] == "dataset" and hub.created[0]["name"] == "stripes"
    assert "Bearer hf_secret" in hub.tokens
    files = hub.repositories[NAME]
    assert sorted(files) == ["README.md", "contact_sheet.png", "memory.hmn"]
    assert files["memory.hmn"] == memory.to_bytes()
    Image.open(io.BytesIO(files["contact_sheet.png"])).verify()
    for name in (f"hf://{NAME}", f"hf://datasets/{NAME}", Path(f"hf://{NAME}")):
        assert hmn_replay.load(name).to_bytes() == memory.to_bytes()
    assert hub.revisions[-1] in ("main", "0123456789" * 4)


def test_a_revision_and_a_file_can_be_named(hub: Hub) -> None:
    memory = any_memory("raw")
    memory.push_to_hub(NAME, revision="trial")
    assert hub.revisions == ["trial"]
    assert f'load("hf://{NAME}@trial")' in hub.repositories[NAME]["README.md"].decode()
    hub.repositories[NAME]["more/other.hmn"] = b""
    hub.repositories[NAME]["other.hmn"] = b"no memory"
    hmn_replay.load(f"hf://{NAME}@v1.0")
    assert "v1.0" in hub.revisions
    memory.push_to_hub(NAME, revision="refs/pr/1")
    assert f'load("hf://{NAME}@refs%2Fpr%2F1")' in hub.repositories[NAME]["README.md"].decode()
    hmn_replay.load(f"hf://{NAME}@refs%2Fpr%2F1")
    assert hub.revisions[-1] == "refs%2Fpr%2F1", "quoted once, in the URL"
    with pytest.raises(MemoryFileError, match=r"other\.hmn"):
        hmn_replay.load(f"hf://{NAME}/other.hmn")


def test_a_token_is_for_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    memory = any_memory("raw")
    memory.push_to_hub(NAME, private=True, token="hf_writer")
    assert "Bearer hf_reader" not in hub.tokens
    assert hmn_replay.load(f"hf://{NAME}", token="hf_reader").to_bytes() == memory.to_bytes()
    assert "Bearer hf_reader" in hub.tokens
    memory.save(tmp_path / "memory.hmn")
    with pytest.raises(ConfigError, match=r"token= is a login to the Hub, .* got the file '.*hmn'"):
        hmn_replay.load(tmp_path / "memory.hmn", token="hf_reader")


def test_an_absent_file_is_an_os_error(hub: Hub) -> None:
    any_memory("raw").push_to_hub(NAME)
    with pytest.raises(OSError, match=f"cannot fetch absent.hmn of {NAME} from the Hub: "):
        hmn_replay.load(f"hf://{NAME}/absent.hmn")


def test_the_command_inspects_what_is_there(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    any_memory("raw").push_to_hub(NAME)
    assert main(["inspect", f"hf://{NAME}"]) == 0
    assert "raw" in capsys.readouterr().out


def test_the_card_says_what_the_memory_is(hub: Hub) -> None:
    memory = real("jpeg", classes=(0, 3))
    memory.class_names = {0: "cat"}
    memory.report = {"effort": "quick", "seconds": 12.25, "network": ["convnet"]}
    memory.push_to_hub(NAME, source="Stripes", accuracy=0.7251, license="mit", tags=["stripes"])
    card = hub.repositories[NAME]["README.md"].decode()
    metadata = card.split("---")[1]
    for tag in ("hmn_replay", "dataset-distillation", "jpeg", "stripes"):
        assert f"- {tag}\n" in metadata
    assert "license: mit" in metadata and "n<1K" in metadata
    for row in (
        "| source | Stripes |",
        "| images | 5 of 3 x 8 x 8 |",
        "| classes | 2, 2 to 3 images each |",
        f"| file | {memory.file_bytes:,} bytes |",
        "| kind | jpeg |",
        "| quality | 30 |",
        "| effort | quick |",
        "| network | convnet |",
        "| test accuracy | 72.51% |",
    ):
        assert row in card
    assert f'hmn_replay.load("hf://{NAME}")' in card and "Classes: cat, 3." in card
    assert '"seconds": 12.25' in card and "budget" not in card


@pytest.mark.parametrize("address", ["hf://stripes", "hf://a/b@", "hf://", "hf://a b/c"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected hf://OWNER/NAME"):
        hmn_replay.load(address)


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = any_memory("raw")
    for name in ("huggingface_hub", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for use in (
        lambda: memory.push_to_hub(NAME),
        lambda: hmn_replay.load(f"hf://{NAME}"),
        memory.to_hf_dataset,
    ):
        with pytest.raises(MissingExtraError, match=r"pip install 'hmn-replay\[hub\]'"):
            use()


def test_a_memory_becomes_a_data_set_and_back() -> None:
    pytest.importorskip("datasets", reason="needs the extra hub")
    memory = real("raw", classes=(0, 1))
    memory.class_names = {0: "cat", 1: "dog"}
    data = memory.to_hf_dataset()
    assert data.column_names == ["image", "label"]
    assert data.features["label"].names == ["cat", "dog"]
    back = hmn_replay.as_labelled_images(data.rename_columns({"image": "img", "label": "kind"}))
    images, labels = memory.decode(dtype=torch.uint8)
    assert torch.equal(back.images, images) and torch.equal(back.labels, labels)
    assert back.class_names == {0: "cat", 1: "dog"}
    unnamed = real("raw", image_shape=(1, 8, 8)).to_hf_dataset()
    assert unnamed["label"][:] == [-3, -3, 7, 7, 7] and unnamed[0]["image"].mode == "L"


def test_a_data_set_of_mappings_is_condensed() -> None:
    class Rows(list[dict[str, Any]]):
        """Rows as Hugging Face's, of two labels."""

        class ClassLabel:
            names = ("low", "high")

        class Sequence:
            pass

        features = {"image": Sequence(), "label": ClassLabel(), "coarse": ClassLabel()}  # noqa: RUF012

    pixels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    rows = Rows({"image": image, "label": i % 2, "coarse": 0} for i, image in enumerate(pixels))
    data = hmn_replay.as_labelled_images(rows)
    assert torch.equal(data.images, pixels) and data.labels.tolist() == [0, 1] * 3
    assert data.class_names == {0: "low", 1: "high"}
    rows[2] = {"picture": pixels[2], "label": 0}
    with pytest.raises(DataError, match=r"item 2.*a mapping with the keys 'image' and 'label'"):
        hmn_replay.as_labelled_images(rows)


def test_a_memory_over_its_budget_is_not_put_there(hub: Hub) -> None:
    memory = any_memory("raw")
    memory.budget_bytes = memory.file_bytes - 1
    with pytest.raises(BudgetError, match="call shrink"):
        memory.push_to_hub(NAME)
    assert NAME not in hub.repositories


def test_a_hub_that_refuses_is_told_in_one_line(hub: Hub) -> None:
    hub.status = 403
    with pytest.raises(OSError, match=f"cannot put the memory into {NAME} on the Hub: 403") as told:
        any_memory("raw").push_to_hub(NAME)
    assert "\n" not in str(told.value)

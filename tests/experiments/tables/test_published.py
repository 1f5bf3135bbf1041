"""The paper's numbers, against the sentences that they were noted down in."""

from __future__ import annotations

import re

import pytest

from experiments.tables import published
from experiments.tables.published import dataset_name

SAME_LOSS = (
    "raw images 36.7/58.3/69.5, IDC 50.0/67.5/74.5, HaBa 48.5/61.8/72.4, LinBa 62.0/67.8/70.7, "
    "HMN 65.7/73.7/76.9"
)
OWN_LOSS = (
    "DC 28.3/44.9/53.9, DSA 28.8/52.1/60.6, DM 26.0/48.9/63.0, MTT 46.3/65.3/71.6, "
    "HaBa 48.3/69.9/74.0, LinBa 66.4/71.2/73.6"
)
ARCHITECTURES = "VGG16 58.5/64.3/70.2, ResNet18 56.8/62.9/69.1, DenseNet121 50.7/56.9/65.1"
MEMORY = "HMN 2680/4540/10426, HaBa 3368/11148/48276"


def parse(text: str) -> dict[str, dict[int, float]]:
    parts = (part.rpartition(" ") for part in text.split(", "))
    return {
        name.lower().replace(" ", ""): dict(
            zip((1, 10, 50), map(float, row.split("/")), strict=True)
        )
        for name, _, row in parts
    }


def test_containers() -> None:
    same, own = parse(SAME_LOSS), parse(OWN_LOSS)
    expected = {name: same[name] for name in ("hmn", "linba", "haba", "idc")}
    expected |= {"raw": same["rawimages"], "haba-mtt": own["haba"], "linba-bptt": own["linba"]}
    expected |= {name: own[name] for name in ("dc", "dsa", "dm", "mtt")}
    assert expected == published.CONTAINERS


def test_architectures() -> None:
    expected = {"convnet": parse(SAME_LOSS)["hmn"], **parse(ARCHITECTURES)}
    assert expected == published.ARCHITECTURES["hmn"]
    idc = {"convnet": parse(SAME_LOSS)["idc"], **parse("VGG16 28.7/43.1/57.9")}
    assert idc == published.ARCHITECTURES["idc"]


def test_datasets() -> None:
    text = (
        "cifar100 36.3 vs 34.0 (1), 45.4 vs 42.9 (10); svhn 87.4 vs 87.3 (1), 90.0 vs 89.1 (10); "
        "tiny_imagenet 19.4 vs 16.0 (1), 24.4 vs 23.2 (10); imagenet10 64.6 vs 60.4 (1)"
    )
    for part in text.split("; "):
        name, _, numbers = part.partition(" ")
        found = re.findall(r"([\d.]+) vs ([\d.]+) \((\d+)\)", numbers)
        assert published.DATASETS[name] == {
            "hmn": {int(ipc): float(hmn) for hmn, _, ipc in found},
            "rival": {int(ipc): float(rival) for _, rival, ipc in found},
        }
    # On CIFAR-10: LinBa's own loss, twice, and IDC.
    assert published.DATASETS["cifar10"]["rival"] == {1: 66.4, 10: 71.2, 50: 74.5}
    assert len(published.DATASETS) == 5


def test_memory() -> None:
    assert {name: published.MEMORY[name] for name in ("hmn", "haba")} == parse(MEMORY)
    assert set(published.MEMORY["linba"].values()) == {"out of memory"}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("cifar10", "cifar10"),
        ("sets/CIFAR-100.npz", "cifar100"),
        ("sets/tiny-imagenet-200/", "tiny_imagenet"),
        ("SVHN", "svhn"),
        ("imagenet-10", "imagenet10"),
    ],
)
def test_a_data_set_is_known_by_the_letters_of_its_name(data: str, name: str) -> None:
    assert dataset_name(data) == name

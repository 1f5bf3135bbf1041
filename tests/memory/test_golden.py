"""Files that were written once, and are read for ever: see tests/data/golden/make_golden.py."""

from __future__ import annotations

import copy
import json
import pickle
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hmn_replay.memory import MEMORIES, LearnedMemory, load
from hmn_replay.memory.file import unpack
from hmn_replay.memory.formats import NUMBER_FORMATS
from tests.support import LEARNED_FORMATS, REAL

FOLDER = Path(__file__).parents[1] / "data" / "golden"
NAMES = {
    **{f"{kind}-{number_format}": (kind, number_format) for kind, number_format in LEARNED_FORMATS},
    **{kind: (kind, "") for kind in REAL},
}
FEATURES = {f"features-{number_format}": number_format for number_format in NUMBER_FORMATS}
REAL_FEATURES = ("raw-features", "pq")
LABELLED = {
    "hmn-entropy-soft": ("hmn", "entropy"),
    "raw-soft": ("raw", ""),
    "jpeg-labeller": ("jpeg", ""),
}
DIGESTS = json.loads((FOLDER / "golden.json").read_text())

EVERY = {**NAMES, **LABELLED}
EVERY_FEATURE = (*FEATURES, *REAL_FEATURES)
every_file = pytest.mark.parametrize("name", NAMES)
every_file_or_labelled = pytest.mark.parametrize("name", EVERY)


def digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def decoded(name: str) -> dict[str, Any]:
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


@pytest.mark.parametrize("name", [*EVERY, *EVERY_FEATURE])
def test_every_kind_and_number_format_has_a_file_that_nobody_has_touched(name: str) -> None:
    assert digest((FOLDER / f"{name}.hmn").read_bytes()) == DIGESTS[name]["file"]


@every_file
def test_a_golden_file_is_read_to_what_it_says(name: str) -> None:
    kind, number_format = NAMES[name]
    memory = load(FOLDER / f"{name}.hmn")
    assert memory.kind == kind
    assert memory.image_shape == (3, 9, 13)
    assert memory.budget_bytes == 20_000
    assert memory.class_names == {-3: "Straßenbahn", 7: "cat"}
    wanted = decoded(name)
    assert memory.labels.equal(wanted["labels"])
    if isinstance(memory, LearnedMemory):
        assert memory.layout.number_format == number_format
        size = memory.layout.group_size
        assert memory.classes.tolist() == [7, -3, 2**40]
        assert memory.images_per_class == [size, 2 * size, 0]
    else:
        assert memory.classes.tolist() == [-3, 7, 2**40]
        assert memory.images_per_class == [1, 2, 1]


@every_file_or_labelled
def test_a_golden_file_decodes_to_the_images_that_it_did(name: str) -> None:
    """Bit for bit where they are real; a CPU may round a float of learned ones in another way."""
    memory = load(FOLDER / f"{name}.hmn")
    pixels, wanted = memory.decode(dtype=torch.uint8)[0], decoded(name)["pixels"]
    if memory.kind in REAL:
        assert pixels.equal(wanted)
    else:
        assert int((pixels.int() - wanted.int()).abs().max()) <= 1
        assert int(wanted.max()) - int(wanted.min()) > 100


@pytest.mark.parametrize("name", EVERY_FEATURE)
def test_a_golden_file_decodes_to_the_features_that_it_did(name: str) -> None:
    memory, wanted = load(FOLDER / f"{name}.hmn"), decoded(name)
    features, labels = memory.decode()
    assert memory.image_shape == (6, 2, 3) and labels.equal(wanted["labels"])
    assert memory.class_names == {-3: "Straßenbahn", 7: "cat"}
    if name in REAL_FEATURES:
        assert features.equal(wanted["pixels"])
    else:
        torch.testing.assert_close(features, wanted["pixels"], rtol=1e-5, atol=1e-5)
    assert float(wanted["pixels"].std()) > 0.1


@pytest.mark.parametrize("name", [*EVERY, *EVERY_FEATURE])
def test_a_golden_file_is_written_again_as_it_is(name: str) -> None:
    """Integers, steps, scales and the entropy code: names alone depend on the version of zlib."""
    memory = load(FOLDER / f"{name}.hmn")
    old, new = (unpack(data) for data in ((FOLDER / f"{name}.hmn").read_bytes(), memory.to_bytes()))
    assert (new.kind, new.num_images, new.budget_bytes) == (old.kind, old.num_images, 20_000)
    assert new.words == old.words
    assert set(new.tensors) == set(old.tensors)
    for key, tensor in old.tensors.items():
        if key != "names":
            assert new.tensors[key].equal(tensor), key


@pytest.mark.parametrize("name", LABELLED)
def test_labels_of_a_golden_file_are_read_to_what_they_were(name: str) -> None:
    memory, wanted = load(FOLDER / f"{name}.hmn"), decoded(name)
    assert memory.richest_labels == name.rpartition("-")[2]
    if memory.has_soft_labels:
        torch.testing.assert_close(memory.soft_labels(), wanted["soft"], rtol=1e-6, atol=1e-8)
        assert len(wanted["soft"].unique()) > 4
    else:
        assert memory.labeller is not None
        logits = memory.labeller(wanted["pixels"].float() / 255)
        torch.testing.assert_close(logits, wanted["logits"], rtol=1e-4, atol=1e-4)
        assert float(wanted["logits"].std()) > 0.1


@pytest.mark.parametrize("name", [*(name for name in NAMES if name not in REAL), *FEATURES])
def test_a_golden_file_is_read_to_the_same_values_on_every_machine(name: str) -> None:
    memory = load(FOLDER / f"{name}.hmn")
    assert isinstance(memory, LearnedMemory)
    values = [memory.get_parameter(own).detach().numpy().tobytes() for own in memory.tensors]
    assert digest(b"".join(values)) == DIGESTS[name]["values"]


@pytest.mark.parametrize("name", [*EVERY, *EVERY_FEATURE])
def test_copies_and_pickles_of_every_kind_give_the_same_images(name: str) -> None:
    memory = load(FOLDER / f"{name}.hmn")
    images, labels = memory.decode()
    for same in (pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory)):
        assert type(same) is type(memory) and same.to_bytes() == memory.to_bytes()
        again, its_labels = same.decode()
        assert again.equal(images) and its_labels.equal(labels)


def test_every_kind_has_a_file() -> None:
    files = (FOLDER / f"{name}.hmn" for name in (*EVERY, *EVERY_FEATURE))
    assert {load(file).kind for file in files} == set(MEMORIES)

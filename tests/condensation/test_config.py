"""Settings by name, checked, and read from what a person types."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.condensation.condense import check_config
from hmn_replay.condensation.config import EFFORTS, CondenseConfig, make_config
from hmn_replay.errors import ConfigError, UnknownOptionError
from hmn_replay.memory import HierarchicalMemory
from hmn_replay.objectives import Objective
from hmn_replay.objectives.trajectories import EXPERT_TRAINING

FIELDS = list(CondenseConfig.model_fields)


def read_option(name: str, text: str) -> Any:
    """Return the value of a field from how a person types it."""
    return getattr(make_config(**{name: text}), name)


@pytest.mark.parametrize("effort", EFFORTS)
def test_every_effort_is_a_valid_set_of_settings(effort: str) -> None:
    config = make_config(effort)
    for name, value in EFFORTS[effort].items():
        assert getattr(config, name) == value


def test_quick_is_the_default() -> None:
    assert make_config() == make_config("quick") == CondenseConfig()


def test_paper_is_idcs_schedule() -> None:
    config = make_config("paper")
    assert (config.outer_steps, config.inner_steps) == (2000, 100)
    assert (config.real_batch, config.decoded_batch) == (64, 128)
    assert (config.network, config.network_width, config.network_images) == (
        ("convnet",),
        128,
        2000,
    )
    assert (config.network_learning_rate, config.network_cutmix_probability) == (0.01, 0.5)
    assert config.augmentations == ("color", "crop", "cutout")
    assert (config.number_format, config.over_budget) == ("float32", 0.1)


def test_paper_has_the_students_and_experts_of_mtt() -> None:
    config = make_config("paper", objective="mtt")
    assert (config.num_experts, config.max_start_epoch, config.expert_epochs) == (100, 20, 2)
    assert (config.student_steps, config.student_learning_rate) == (30, 0.01)
    assert config.expert_training == EXPERT_TRAINING.replace(
        augmentations=config.augmentations, precision="auto"
    )


def test_experts_are_trained_as_the_settings_say() -> None:
    training = make_config(
        network="resnet18",
        network_width=5,
        expert_images=70,
        expert_batch=9,
        expert_learning_rate=0.5,
        augmentations=("flip",),
        precision="bfloat16",
    ).expert_training
    assert training == EXPERT_TRAINING.replace(
        width=5,
        epoch_images=70,
        batch_size=9,
        learning_rate=0.5,
        augmentations=("flip",),
        precision="bfloat16",
    )


def test_an_option_replaces_the_efforts_own() -> None:
    config = make_config("standard", outer_steps=3)
    assert config == make_config("standard").replace(outer_steps=3)


def test_every_field_is_described() -> None:
    assert all(field.description for field in CondenseConfig.model_fields.values())


def test_beta_is_searched_on_request_only() -> None:
    assert all(make_config(effort).beta_grid == () for effort in EFFORTS)
    assert make_config(beta_grid="0,0.5,1").beta_grid == (0.0, 0.5, 1.0)


def test_numbers_of_numpy_make_the_same_settings() -> None:
    config = make_config(
        outer_steps=np.int64(3),
        classes_per_step=np.uint8(5),
        over_budget=np.int32(1),
        holdout=np.float64(0.25),
        beta_grid=np.linspace(0, 1, 3),
    )
    plain = make_config(
        outer_steps=3, classes_per_step=5, over_budget=1.0, holdout=0.25, beta_grid=(0.0, 0.5, 1.0)
    )
    assert repr(config) == repr(plain)  # what a checkpoint knows a run by
    assert config.model_dump_json() == plain.model_dump_json()


def match_nothing(*batches: Any) -> Any:
    raise AssertionError(batches)


def make_nothing(image_shape: Any, num_classes: int) -> Any:
    raise AssertionError(image_shape, num_classes)


@pytest.mark.parametrize("option", [{"beta": 0.0}, {"beta_grid": (0.2, 0.8)}])
def test_a_beta_is_not_for_pruning_by_order(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"leave {next(iter(option))} out"):
        check_config(make_config(pruning="order", **option), HierarchicalMemory)


def test_functions_stand_in_for_names_and_are_reported_by_theirs() -> None:
    config = make_config(objective=match_nothing, network=("convnet", make_nothing))
    assert config.objective is match_nothing
    assert config.network == ("convnet", make_nothing)
    told = json.loads(config.model_dump_json())
    assert told["objective"].endswith("test_config.match_nothing")
    assert told["network"][0] == "convnet"
    assert told["network"][1].endswith("test_config.make_nothing")
    assert make_config(network=make_nothing).network == (make_nothing,)
    named = make_config(objective=Objective(match_nothing)).model_dump()["objective"]
    assert named == told["objective"]


def test_the_training_of_the_pruning_has_its_own_size() -> None:
    training = make_config(
        network="resnet18",
        pruning_width=5,
        pruning_passes=77,
        pruning_augmentations=("crop",),
        network_cutmix_probability=0.25,
        precision="bfloat16",
    ).pruning_training
    assert (training.augmentations, training.cutmix_probability) == (("crop",), 0.25)
    assert (training.network, training.width, training.num_passes) == ("resnet18", 5, 77)
    assert training.precision == "bfloat16"


def test_what_is_chosen_by_aum_asks_for_it() -> None:
    assert make_config("draft").pruning == "order"
    assert make_config("draft", beta=0.2).pruning == "aum"
    assert make_config("draft", beta_grid=(0.2, 0.8)).pruning == "aum"
    assert make_config("draft", beta=0.2, pruning="order").pruning == "order"


def test_another_effort_or_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="one of draft, quick, standard, paper; got 'slow'"):
        make_config("slow")
    with pytest.raises(TypeError, match="no option 'outer_step'; did you mean 'outer_steps'"):
        make_config(outer_step=3)
    with pytest.raises(UnknownOptionError, match="no option 'depth'; the command 'hmn-replay opt"):
        read_option("depth", "3")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("number_format", "int4"),
        ("objective", "ntk"),
        ("network", "alexnet"),
        ("precision", "float16"),
        ("augmentations", ("color", "colour")),
        ("over_budget", -0.1),
        ("over_budget", math.nan),
        ("holdout", 0.0),
        ("holdout", 0.6),
        ("network_cutmix_probability", 1.1),
        ("beta_grid", (0.5, 1.5)),
        ("beta_grid", (math.nan,)),
        ("classes_per_step", 0),
        ("memory_learning_rate", 0.0),
        ("memory_learning_rate", math.inf),
        ("warm_start_learning_rate", math.nan),
        ("network_learning_rate", -1.0),
        *((name, 0.0) for name in ("warm_start_seconds", "max_seconds")),
        *((name, math.inf) for name in ("warm_start_seconds", "max_seconds")),
        *((name, -1) for name in ("warm_start_steps", "outer_steps", "inner_steps")),
        ("network_images", -1),
        *((name, 0) for name in ("warm_start_batch", "real_batch", "decoded_batch")),
        *((name, 0) for name in ("network_width", "network_batch")),
        *((name, 0) for name in ("pruning_passes", "pruning_width")),
        *((name, 0) for name in ("num_experts", "expert_images", "expert_epochs")),
        *((name, 0) for name in ("student_steps", "student_batch", "student_learning_rate")),
        ("experts", ""),
        ("expert_batch", 1),
        ("expert_learning_rate", 0.0),
        ("max_start_epoch", -1),
        ("student_rate_learning_rate", -0.1),
        ("student_rate_learning_rate", math.inf),
    ],
)
def test_a_value_outside_its_range_is_refused_by_name(name: str, value: Any) -> None:
    shown = name.replace("_", "[_ ]")
    with pytest.raises(ConfigError, match=rf"^(each entry of )?{shown}.* must .*; got "):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("outer_steps", "3", 3),
        ("outer_steps", " 3 ", 3),
        ("over_budget", "0.25", 0.25),
        ("over_budget", "1", 1.0),
        ("memory_learning_rate", "1e-3", 1e-3),
        ("classes_per_step", "none", None),
        ("classes_per_step", "None", None),
        ("classes_per_step", "5", 5),
        ("experts", "none", None),
        ("experts", "folder/of experts", "folder/of experts"),
        ("experts", "7", "7"),
        ("expert_images", "none", None),
        ("network", "vgg16,convnet", ("vgg16", "convnet")),
        ("beta_grid", "0,0.5,1", (0.0, 0.5, 1.0)),
        ("beta_grid", "0.5", (0.5,)),
        ("beta_grid", "0, 1", (0.0, 1.0)),
        ("augmentations", "color,flip", ("color", "flip")),
        ("augmentations", "color, flip", ("color", "flip")),
        ("augmentations", "", ()),
    ],
)
def test_an_option_is_read_as_a_person_types_it(name: str, text: str, value: Any) -> None:
    parsed = read_option(name, text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert getattr(make_config(**{name: parsed}), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_can_be_typed(name: str) -> None:
    value = getattr(CondenseConfig(), name)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert read_option(name, text) == value


@pytest.mark.parametrize(
    "text", ["{[]: 1}", "-" * 10_000 + "1", "(" * 500, "'\\d'", "\0", "1" * 400, "1" * 9999]
)
def test_a_hostile_text_is_refused_like_any_other(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^over_budget must be"):
        make_config(over_budget=text)


@given(st.sampled_from(FIELDS), st.text(max_size=10))
def test_any_text_is_read_or_refused(name: str, text: str) -> None:
    with contextlib.suppress(ConfigError):
        make_config(**{name: read_option(name, text)})


@pytest.mark.parametrize("effort", [["quick"], None, 1])
def test_an_effort_that_is_no_name_is_refused(effort: Any) -> None:
    with pytest.raises(ConfigError, match="effort must be one of draft, quick, standard, paper"):
        make_config(effort)

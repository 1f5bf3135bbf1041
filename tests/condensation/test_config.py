"""Settings by name, checked, and read from what a person types."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmn_replay.condensation.config import EFFORTS, CondenseConfig, make_config, parse_option
from hmn_replay.errors import ConfigError
from hmn_replay.objectives.trajectories import EXPERT_TRAINING

FIELDS = [field.name for field in dataclasses.fields(CondenseConfig)]


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
    assert config == dataclasses.replace(make_config("standard"), outer_steps=3)


def test_every_field_is_told_in_the_docstring() -> None:
    assert CondenseConfig.__doc__ is not None
    for name in FIELDS:
        assert f"        {name}: " in CondenseConfig.__doc__


def test_values_are_brought_to_the_fields_type() -> None:
    config = make_config(over_budget=1, beta_grid=[0, 1], augmentations=["flip"])
    assert (config.over_budget, type(config.over_budget)) == (1.0, float)
    assert config.beta_grid == (0.0, 1.0)
    assert all(type(beta) is float for beta in config.beta_grid)
    assert config.augmentations == ("flip",)
    assert hash(config) == hash(dataclasses.replace(config))


def test_numbers_of_numpy_are_brought_to_the_fields_type() -> None:
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
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(plain))


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


def test_another_effort_or_option_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="one of quick, standard, paper; got 'slow'"):
        make_config("slow")
    with pytest.raises(
        ConfigError, match=r"no option 'outer_step'; there are number_format, .*oute"
    ):
        make_config(outer_step=3)


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
        ("beta_grid", ()),
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
    with pytest.raises(ConfigError, match=rf"^{name} must be .*, got "):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("outer_steps", 3.0),
        ("outer_steps", "3"),
        ("outer_steps", True),
        ("outer_steps", None),
        ("over_budget", "0.1"),
        ("over_budget", False),
        ("over_budget", 10**400),
        ("outer_steps", np.True_),
        ("outer_steps", np.float64(3)),
        ("network", 3),
        ("network", None),
        ("beta_grid", 0.5),
        ("beta_grid", ("a",)),
        ("augmentations", "color"),
        ("augmentations", None),
        ("classes_per_step", 2.5),
        ("experts", 3),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be (int|float|str|a list)"):
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
    parsed = parse_option(name, text)
    assert parsed == value
    assert type(parsed) is type(value)
    assert getattr(make_config(**{name: parsed}), name) == value


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_can_be_typed(name: str) -> None:
    value = getattr(CondenseConfig(), name)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    assert parse_option(name, text) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("outer_steps", "three"),
        ("outer_steps", "3.5"),
        ("outer_steps", "none"),
        ("outer_steps", ""),
        ("outer_steps", "True"),
        ("over_budget", "10 %"),
        ("beta_grid", "0;1"),
        ("beta_grid", "none"),
        ("network", "none"),
    ],
)
def test_a_text_that_is_no_such_value_is_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        parse_option(name, text)


@pytest.mark.parametrize(
    "text", ["{[]: 1}", "-" * 10_000 + "1", "(" * 500, "'\\d'", "\0", "1" * 400, "1" * 9999]
)
def test_a_hostile_text_is_refused_like_any_other(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^over_budget must be"):
        make_config(over_budget=parse_option("over_budget", text))


@given(st.sampled_from(FIELDS), st.text(max_size=10))
def test_any_text_is_read_or_refused(name: str, text: str) -> None:
    with contextlib.suppress(ConfigError):
        make_config(**{name: parse_option(name, text)})


def test_an_option_that_is_not_there_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="no option 'depth'; there are number_format"):
        parse_option("depth", "3")


@pytest.mark.parametrize("effort", [["quick"], None, 1])
def test_an_effort_that_is_no_name_is_refused(effort: Any) -> None:
    with pytest.raises(ConfigError, match="effort is one of quick, standard, paper"):
        make_config(effort)

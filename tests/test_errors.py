"""The errors keep their promise to those who catch built-in exceptions."""

from __future__ import annotations

import pickle

import pytest

from hmn_replay import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.BudgetError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.MemoryFileError, ValueError),
        (errors.CheckpointError, RuntimeError),
        (errors.DistributedError, RuntimeError),
        (errors.ExpertError, RuntimeError),
        (errors.TrainingError, RuntimeError),
        (errors.UnknownOptionError, TypeError),
    ],
)
def test_every_error_is_also_the_built_in_that_fits(
    error: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(error, errors.HMNReplayError)
    assert issubclass(error, builtin)


def test_all_names_every_error_of_the_module() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_survives_the_way_out_of_a_worker_process(name: str) -> None:
    error = getattr(errors, name)("what came")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == "what came"

"""The errors that hmn_replay raises.

Every one of them is an :class:`HMNReplayError` and also the built-in exception that fits, so that
``except ValueError`` keeps working for those who do not know this package.
"""

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DistributedError",
    "ExpertError",
    "HMNReplayError",
    "HMNReplayWarning",
    "MemoryFileError",
    "MissingExtraError",
    "TrainingError",
    "UnknownOptionError",
]


class HMNReplayError(Exception):
    """Base class of every error that this package raises on purpose."""


class HMNReplayWarning(UserWarning):
    """Base class of every warning of this package."""


class BudgetError(HMNReplayError, ValueError):
    """A budget that cannot be read, or that is too small for what was asked."""


class ConfigError(HMNReplayError, ValueError):
    """An option with a value outside what it may be."""


class UnknownOptionError(HMNReplayError, TypeError):
    """A keyword that a function or class does not take."""


class DataError(HMNReplayError, ValueError):
    """Images or labels that this package cannot use."""


class MissingExtraError(HMNReplayError, ImportError):
    """A library that an extra of this package installs, and that is not there."""


class MemoryFileError(HMNReplayError, ValueError):
    """A file that is not a whole, unaltered memory file of a version that this package reads."""


class CheckpointError(HMNReplayError, RuntimeError):
    """A checkpoint that belongs to another run, or that cannot be read."""


class DistributedError(HMNReplayError, RuntimeError):
    """Processes that work together, one of which was lost or was given other arguments."""


class ExpertError(HMNReplayError, RuntimeError):
    """Expert trajectories of other data or settings, or that cannot be read."""


class TrainingError(HMNReplayError, RuntimeError):
    """An optimisation that diverged."""

"""Replay without a framework: a memory that is renewed with what comes, and drawn from."""

from hmn_replay.replay.keepers import (
    JPEGKeeper,
    Keeper,
    LearnedKeeper,
    PQKeeper,
    RealKeeper,
    Selection,
    make_keeper,
)
from hmn_replay.replay.mammoth import MammothBuffer
from hmn_replay.replay.store import DecodedImages, ReplayMemory

__all__ = [
    "DecodedImages",
    "JPEGKeeper",
    "Keeper",
    "LearnedKeeper",
    "MammothBuffer",
    "PQKeeper",
    "RealKeeper",
    "ReplayMemory",
    "Selection",
    "make_keeper",
]

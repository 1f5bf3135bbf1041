"""What is stored: memories, number formats and the file."""

from hmn_replay.memory.base import MEMORIES, DecodedDataset, Memory, load, loads, register_memory
from hmn_replay.memory.features import FeatureLayout, FeatureMemory
from hmn_replay.memory.formats import NUMBER_FORMATS, NumberFormat
from hmn_replay.memory.frequencies import FrequencyLayout, FrequencyMemory
from hmn_replay.memory.hierarchical import HierarchicalMemory, HMNLayout
from hmn_replay.memory.layout import MemoryLayout, StoredTensor
from hmn_replay.memory.learned import LearnedMemory
from hmn_replay.memory.real import (
    JPEGMemory,
    LosslessMemory,
    RawMemory,
    RealMemory,
    SubsampledMemory,
)
from hmn_replay.memory.real_features import PQMemory, RawFeatureMemory
from hmn_replay.memory.rivals import (
    HaBaLayout,
    HaBaMemory,
    IDCLayout,
    IDCMemory,
    LinBaLayout,
    LinBaMemory,
    PixelLayout,
    PixelMemory,
)

__all__ = [
    "MEMORIES",
    "NUMBER_FORMATS",
    "DecodedDataset",
    "FeatureLayout",
    "FeatureMemory",
    "FrequencyLayout",
    "FrequencyMemory",
    "HMNLayout",
    "HaBaLayout",
    "HaBaMemory",
    "HierarchicalMemory",
    "IDCLayout",
    "IDCMemory",
    "JPEGMemory",
    "LearnedMemory",
    "LinBaLayout",
    "LinBaMemory",
    "LosslessMemory",
    "Memory",
    "MemoryLayout",
    "NumberFormat",
    "PQMemory",
    "PixelLayout",
    "PixelMemory",
    "RawFeatureMemory",
    "RawMemory",
    "RealMemory",
    "StoredTensor",
    "SubsampledMemory",
    "load",
    "loads",
    "register_memory",
]

MEMORIES.mark_built_in()

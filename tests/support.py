"""Condensation in a tenth of a second, for tests of several modules."""

from __future__ import annotations

from typing import Any

from hmn_replay.condense import condense
from hmn_replay.container import Container
from hmn_replay.container_layout import ContainerLayout
from hmn_replay.data import LabelledImages

TINY: dict[str, Any] = {
    "device": "cpu",
    "warm_start_steps": 4,
    "warm_start_batch": 5,
    "outer_steps": 2,
    "inner_steps": 3,
    "real_batch": 3,
    "decoded_batch": 3,
    "network_width": 3,
    "network_images": 8,
    "network_batch": 4,
    "beta_grid": (0.0, 1.0),
    "over_budget": 0.3,
    "pruning_passes": 20,
    "pruning_width": 3,
}


def tiny(data: LabelledImages, layout: ContainerLayout, **options: Any) -> Container:
    budget = options.pop("budget", None)
    if budget is None:
        num_classes = data.num_classes
        budget = layout.file_bytes(num_classes, 3 * num_classes + 1, 10**4)
    return condense(data, budget, layout=layout, **{**TINY, **options})

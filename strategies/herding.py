"""Replay of herded images: of each class those whose features, in order, keep close to its mean.

iCaRL's selection (Rebuffi et al. 2017, Algorithm 4), as many images of every class, as uint8
pixels. When classes come, the others drop their last images. Avalanche's own buffer herds what is
left anew each time, takes features of two axes alone, and leaves the model in evaluation mode.
The features are those of the network as it is when the memory is renewed: by default before it is
trained on an experience, with renew="after", as iCaRL has it, after that.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from hmn_replay import LabelledImages, RawReplay, select_images
from hmn_replay.avalanche.hooks import check_has_head
from strategies.real import build_of
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Raises:
        ConfigError: The model has no linear layer, whose inputs are the features.
    """
    check_has_head(settings.model)
    most = max(1, settings.budget_bytes // math.prod(settings.image_shape))

    def herd(images: LabelledImages, model: nn.Module) -> Tensor:
        num_images = most * images.num_classes
        return select_images(images, "herding", network=model, num_images=num_images)

    return build_of(settings, partial(RawReplay, selection=herd))

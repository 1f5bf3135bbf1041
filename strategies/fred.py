"""HMN replay with images as quantised cosine coefficients: no decoder to fit, added in seconds."""

from __future__ import annotations

from hmn_replay.errors import ConfigError
from strategies import hmn
from strategies.settings import Settings, Strategy

__all__ = ["build"]


def build(settings: Settings) -> Strategy:
    """Build it.

    Options are those of :mod:`strategies.hmn`, without ``kind``.

    Raises:
        ConfigError: An unknown option, or a value outside its range.
    """
    if "kind" in settings.options:
        raise ConfigError('the strategy fred has its kind: pass kind to the strategy "hmn"')
    return hmn.build(settings, kind="fred")

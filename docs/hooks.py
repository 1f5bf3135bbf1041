"""Equations for the pages: MathML, which browsers draw without a script or a font of ours."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Let a fenced block named ``math`` be LaTeX, as it is on GitHub."""
    fence = {"name": "math", "class": "math", "format": _equation}
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(fence)
    return config


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'

"""What mkdocs does not do by itself: equations, and references in docstrings.

Equations become MathML, which browsers draw without a script or a font of ours.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod|obj):`(~?)([\w.]+?)(?:\(\))?`")

_RETURNS = re.compile(r"^ *Returns:\n +", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Let a fenced block named ``math`` be LaTeX, as it is on GitHub."""
    fence = {"name": "math", "class": "math", "format": _equation}
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fences.setdefault("custom_fences", []).append(fence)
    return config


def _equation(source: str, *_: Any, **__: Any) -> str:
    return f'<div class="equation">{convert(source, display="block")}</div>'


class Docstrings(griffe.Extension):
    """Turns ``:class:`Budget` `` into a link, if a page has a place for it.

    What stands before a colon in the first line of "Returns:" would count as a type: the type of
    the signature is put before it.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is None:
            return
        text = _ROLE.sub(lambda match: _link(match, obj), obj.docstring.value)
        if isinstance(obj, griffe.Function) and obj.returns is not None:
            text = _RETURNS.sub(lambda match: f"{match[0]}{obj.returns}: ", text)
        obj.docstring.value = text


def _link(match: re.Match[str], obj: griffe.Object) -> str:
    is_short, name = match.groups()
    try:
        first, _, rest = name.partition(".")
        target = obj.resolve(first) + ("." + rest if rest else "")
    except griffe.NameResolutionError:
        target = name
    text = name.rpartition(".")[2] if is_short or name.startswith("hmn_replay.") else name
    return f'<autoref optional identifier="{target}">`{text}`</autoref>'

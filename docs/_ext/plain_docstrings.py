"""Docstrings are read in editors first: |x|, z_(1) and x* in them are text here, not reStructuredText."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

LITERAL = re.compile(r"(``.*?``|:\w+:`.*?`|`.*?`_?)")
SPECIAL = re.compile(r"(\||(?<=\w)_(?!\w)|(?<!\*)\*(?!\*))")


def escape(line: str) -> str:
    r"""The line with the characters escaped that docutils would take for markup.

    Example:
        >>> escape("|x| = ``|x|`` and z_(1)")
        '\\|x\\| = ``|x|`` and z\\_(1)'
    """
    parts = LITERAL.split(line)
    return "".join(part if i % 2 else SPECIAL.sub(r"\\\1", part) for i, part in enumerate(parts))


def _process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    in_example = False
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "...")):
            in_example = True
        elif not line.strip():
            in_example = False
        if not in_example:
            lines[i] = escape(line)


def setup(app: Sphinx) -> dict[str, bool]:
    """Before napoleon, which listens with the default priority."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}

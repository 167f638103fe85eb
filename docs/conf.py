"""Sphinx configuration: sphinx-build -W -b html docs docs/_build/html."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
sys.path.insert(0, str(Path(__file__).parent.parent / "src"))

import dynablocks

project = "dynablocks"
author = "The dynablocks developers"
copyright = author
release = version = dynablocks.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "plain_docstrings",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]

html_theme = "pydata_sphinx_theme"
html_title = f"dynablocks {release}"
html_show_copyright = False
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
napoleon_use_ivar = True
napoleon_custom_sections = [("Condition", "notes_style"), ("Source", "notes_style")]

# A build must not need a network: the links to other projects are resolved only when asked for.
intersphinx_mapping = (
    {"python": ("https://docs.python.org/3", None), "torch": ("https://docs.pytorch.org/docs/stable", None)}
    if os.environ.get("DYNABLOCKS_DOCS_ONLINE")
    else {}
)

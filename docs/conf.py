"""Sphinx: the pages are Markdown, the reference comes from the docstrings. `make docs` builds with warnings as errors."""

from gain_ops import __version__

project = "gain_ops"
author = "The gain_ops authors"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures have them
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"gain_ops {release}"
html_show_sphinx = False

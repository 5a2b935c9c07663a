"""How Sphinx builds these pages and the API reference: ``make docs``."""

from dit_rope import __version__

project = "dit_rope"
author = "the dit_rope authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"dit_rope {__version__}"

# Headings get the anchors that GitHub gives them, so that one link serves both.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]

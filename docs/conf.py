"""Sphinx's settings: `make docs` builds the site into build/docs."""

from importlib.util import find_spec

import django
from django.conf import settings

from asyncorm import __version__

settings.configure(
    INSTALLED_APPS=["asyncorm"]
)  # the reference is made from docstrings: modules must be importable
django.setup()

project = "asyncorm"
version = release = __version__
copyright = "the authors of asyncorm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
if find_spec("sphinx_copybutton"):  # an older environment lacks it
    extensions.append("sphinx_copybutton")
default_role = "code"
html_theme = "furo"
html_title = "asyncorm"
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Raises (when awaited)", "Raises"),
                            ("Raises (at the first statement)", "Raises")]  # fmt: skip

"""How Sphinx builds the pages of this folder into site/: bash tests/run.sh docs."""

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import dist_agc

project = "dist_agc"
author = "The dist_agc authors"
version = release = dist_agc.__version__

exclude_patterns = ["study/*.md"]  # what the command writes beside the page
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # so that page.md#section leads somewhere here and on a git host alike

html_theme = "furo"
html_title = f"dist_agc {version}"
html_static_path = html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False

# In docstrings a name stands in single backticks, code in double ones.
default_role = "py:obj"
napoleon_numpy_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_mock_imports = ["composer"]  # it needs an older torch than the other integrations

# The build warns of every name that leads nowhere (-n). Those of other packages cannot: nothing is fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(accelerate|torch|nn|collections|typing|numbers)\..*"),
    (r"py:.*", r"Trainer|Accelerator"),
    (r"py:obj", r".*\(.*"),  # a call, which is code
]


def public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: Element) -> Element | None:
    """A public name of dist_agc wants no prefix, whichever module's docstring it stands in."""
    if node.get("reftarget") not in dist_agc.__all__:
        return None
    python = env.domains["py"]
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", f"dist_agc.{node['reftarget']}", node, shown)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", public_name)

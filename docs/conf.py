"""Sphinx: the pages of this folder, and API pages made from docstrings (written to docs/api, which git ignores)."""

from importlib.metadata import version as installed_version
from typing import Any

project = "dlrm_jax"
copyright = "The dlrm_jax authors"
version = release = installed_version("dlrm-jax")

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "api/*/modules.rst"]
default_role = "code"
html_theme = "furo"
html_title = "dlrm_jax"

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

apidoc_modules = [
    {"path": f"../{package}", "destination": f"api/{package}", "separate_modules": True, "module_first": True}
    for package in ("dlrm_jax", "sharding", "pallas_kernels")
]
# Members without a docstring are left out: a dataclass's "Attributes" describe its fields already, and its signature
# has their types. What a package re-exports (__all__) is described in the module that defines it.
apidoc_automodule_options = {"members"}
autodoc_default_options = {"ignore-module-all": True}
autodoc_member_order = "bysource"
# Shapes are annotations (``Float[Array, "B D"]``), so annotations stay in the signature, under short names.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False


def skip_tuple_fields(app: Any, what: str, name: str, member: object, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of a NamedTuple, which Python documents by their numbers; "Attributes" describe them."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> None:
    """Registers the rule above; Sphinx calls it."""
    app.connect("autodoc-skip-member", skip_tuple_fields)

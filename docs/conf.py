"""How the site is built: ``sphinx-build -W docs docs/_build/html``, without a network; every notebook is run.

At the end every link within the site is followed, and nothing on a page may be fetched from elsewhere: see `links.py`.
"""

import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

import refgemma
from refgemma.teach.explorer import explore_run, render_page
from refgemma.teach.live import FIRST_TEXT, render_live

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from links import problems  # noqa: E402  (Sphinx does not put the folder of this file on the path)

# Sphinx reads only files in its own folder.
for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, HERE / "tutorial")
shutil.copytree(HERE.parent / "notebooks" / "pictures", HERE / "tutorial" / "pictures", dirs_exist_ok=True)

# numpydoc also reads Hypothesis's own docstrings.
warnings.filterwarnings("ignore", "Unknown section", UserWarning)

project = "refgemma"
author = "The refgemma developers"
release = refgemma.__version__

extensions = ["myst_nb", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute"]
default_role = "py:obj"
smartquotes_action = "qe"  # quotes and ellipses; else `--help` in prose becomes an en dash
# Every name in backquotes must have a target. Exceptions are names inside a docstring (arguments, attributes, functions
# of its own file) and annotations of other packages.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"[A-Za-z_]\w*"),
    ("py:class", r"(collections|hypothesis|io|jaxtyping|ml_dtypes|numpy|pathlib|typing)\..*"),
    ("py:obj", r"numpy\..*"),
    # Our own names that occur only in signatures and have no entry.
    ("py:class", r"refgemma\.generation\.(stream\.Streamer|generation_config\.Settings)"),
    ("py:class", r"refgemma\.weights\.(stored\.Stored|parameters\.(Rows|Score)|save\.OutputTensor)"),
    ("py:class", r"refgemma\.(testing\.program\.Asked|convert\.convert\.Source)"),
    ("py:class", r"refgemma\.tokenizer\.vocabulary\.TokenizerFile"),
    ("py:class", r"refgemma\.trace\.candidate\.(Call|Tensor)"),
    ("py:class", r"refgemma\.oracle\.(engine\.Instance|estimate\.Estimate|preflight\.Preflight)"),
    ("py:class", r"refgemma\.oracle\.locate\.(ErrorMap|Sides)"),
    ("py:class", r"refgemma\.oracle\.(operations\.(Context|Operation)|optimizer_operations\.WeightStep)"),
    ("py:class", r"refgemma\.teach\.exercises\.guide\.Page"),
    ("py:obj", r"Stored\.read"),
]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_timeout = 600  # seconds a cell, for one that hangs: the machine may have other work
nb_execution_raise_on_error = True
nb_execution_show_tb = True

autodoc_member_order = "bysource"
viewcode_follow_imported_members = False
autodoc_typehints = "signature"  # the axis words are in them
maximum_signature_line_length = 88
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

html_theme = "pydata_sphinx_theme"
html_title = "refgemma"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": True, "secondary_sidebar_items": ["page-toc"]}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"


# --- formulas, as MathML: browsers draw it themselves, so no script is needed and none is fetched ---------------------


def mathml(latex: str, display: str) -> str:
    """A formula for the browser. A word in it is a word, not a product of letters."""
    words = re.sub(r"\\arg(?![a-z])", r"\\text{arg}", re.sub(r"\\mathrm(?=\{)", r"\\text", latex)).replace(r"\_", "_")
    made: str = convert(words, display=display)
    if re.search(r"\\[a-zA-Z]", made):
        raise ValueError(f"a command in this formula is not known to latex2mathml: {latex}")
    return made


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    for formula in re.split(r"\n\s*\n", node.astext()):
        translator.body.append(f'<div class="formula" tabindex="0">{mathml(formula, "block")}</div>')
    raise nodes.SkipNode


def write_explorer(app: Sphinx, failed: Exception | None) -> None:
    """Write the pages of `refgemma explore` and `refgemma explore --live`, to which the tutorial leads."""
    if failed is None and app.builder.format == "html":
        model = refgemma.load("tiny")
        ids = model.tokenizer.encode(FIRST_TEXT)
        page = render_page(explore_run(ids, model, "tiny", "float32"))
        (Path(app.outdir) / "explorer.html").write_text(page, "utf-8")
        (Path(app.outdir) / "live.html").write_text(render_live(), "utf-8")


def follow_links(app: Sphinx, failed: Exception | None) -> None:
    """The build fails where a link leads nowhere."""
    if failed is None and app.builder.format == "html" and (found := problems(Path(app.outdir))):
        raise SphinxError("\n".join(found))


def setup(app: Sphinx) -> None:
    app.connect("build-finished", write_explorer, priority=400)
    app.connect("build-finished", follow_links)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))

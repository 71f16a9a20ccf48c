"""Templates filled in safely: every text is first made visible and then escaped, and only the page's own script runs.

The page's policy names its script by hash: nothing that a model sampled could run even if it became markup.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from pipeline.numbers import number
from pipeline.page import charts
from pipeline.texts import visible

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("rows.js", "list.js", "browser.js")
_SERIES_STYLES = 6  # lines that the style sheet tells apart


def filled(template: str, **values: Any) -> str:
    """A template of the page's folder with these values."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters |= {"number": number, "draw": charts.draw, "table": charts.table}
    edges = ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")
    environment.globals |= {edge.lower(): getattr(charts, edge) for edge in edges}
    script = page_script()
    environment.globals |= {
        "script": Markup(script),  # the project's own text
        "script_hash": script_hash(script),
        "num_series_styles": _SERIES_STYLES,
    }
    return environment.get_template(template).render(**values)


def page_script() -> str:
    """The page's script: all of its parts in one scope of their own."""
    parts = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


def script_hash(script: str) -> str:
    """As a content security policy names a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")

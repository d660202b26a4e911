"""Sections to one HTML file that asks no network for anything. What is said is left to the other files.

Everything that is not a drawing is escaped, control characters are spelt out, and the page's own policy forbids scripts
and requests whatever might slip through.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report.blocks import Head, Section
from pipelines.terminal import printable


def render(title: str, head: Head, sections: Sequence[Section], facts: Sequence[str]) -> str:
    """The whole page. facts: what stands at its foot."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_spelt_out,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Drawings are matplotlib's, which escapes what it is given.
    environment.filters["drawing"] = Markup
    style = files("pipelines.report").joinpath("page.css").read_text(encoding="utf-8")
    template = environment.get_template("page.html")
    return template.render(title=title, head=head, sections=sections, facts=facts, style=Markup(style))


def _spelt_out(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

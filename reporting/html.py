"""A page of sections as one HTML file that fetches nothing, without a figure and so without matplotlib's import."""

from html import escape
from pathlib import Path
from string import Template


def html_page(title: str, lead: str, sections: dict[str, str]) -> str:
    """A page of sections by title."""
    folder = Path(__file__).parent
    links = "".join(f'<li><a href="#{name}">{name}</a></li>' for name in sections)
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        lead=escape(lead),
        nav=f'<nav aria-label="sections"><ul>{links}</ul></nav>' if len(sections) > 1 else "",
        css=(folder / "page.css").read_text(encoding="utf-8"),
        js=(folder / "page.js").read_text(encoding="utf-8"),
        body="".join(f'<section id="{name}"><h2>{name}</h2>{body}</section>' for name, body in sections.items()),
    )

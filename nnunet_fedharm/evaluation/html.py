"""Pieces of HTML that the reports share; all text is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(content: object) -> Html:
    """Escaped, unless it is HTML already."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], *, css: str = "numbers", caption: str = "") -> Html:
    """A table whose first column names the rows; it scrolls by itself where the screen is narrow.

    Args:
        head: names of the columns.
        rows: cells; the first of each is its name.
        css: class.
        caption: above the table.
    """
    if not rows:
        return Html("")
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    words = f"<caption>{text(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll" tabindex="0" role="group"><table class="{css}">{words}<thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(caption: object, chart: str, note: object = "") -> Html:
    """A chart with its caption; nothing where there is no chart."""
    if not chart:
        return Html("")
    small = f"<small>{text(note)}</small>" if note else ""
    above = f"<figcaption>{text(caption)}{small}</figcaption>" if caption or small else ""
    return Html(f"<figure>{above}{chart}</figure>")


def figures(content: Sequence[str]) -> Html:
    """Figures side by side, as many as there is room for."""
    shown = "".join(content)
    return Html(f'<div class="figures">{shown}</div>') if shown else Html("")


def block(title: object, *content: str, lead: object = "") -> Html:
    """A titled part of a section; nothing where it has no content."""
    inside = "".join(content)
    if not inside:
        return Html("")
    words = f"<p>{text(lead)}</p>" if lead else ""
    return Html(f'<div class="block"><h3>{text(title)}</h3>{words}{inside}</div>')


def folded(summary: object, content: str, *, opened: bool = False, css: str = "fold") -> Html:
    """Content that opens with a click, without a script."""
    return Html(
        f'<details class="{css}"{" open" if opened else ""}><summary>{text(summary)}</summary>'
        f'<div class="inside">{content}</div></details>'
    )


def feature_name(name: str) -> Html:
    """`glcm_ClusterShade`, with places where a narrow column may break it."""
    return Html(re.sub(r"(?<=_)(?=\w)|(?<=[a-z])(?=[A-Z])", "<wbr>", escape(name)))


def paragraphs(sentences: Sequence[object]) -> Html:
    """One paragraph each."""
    return Html("".join(f"<p>{text(sentence)}</p>" for sentence in sentences))


def bullets(sentences: Sequence[object]) -> Html:
    """A list."""
    return Html(f"<ul>{''.join(f'<li>{text(item)}</li>' for item in sentences)}</ul>") if sentences else Html("")


def key(entries: Sequence[tuple[str, object]]) -> Html:
    """Colours and what they stand for: (HTML of the mark, name)."""
    items = "".join(f"<span>{mark}{text(name)}</span>" for mark, name in entries)
    return Html(f'<p class="key">{items}</p>')

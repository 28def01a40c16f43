"""The little Markdown of the methods section as HTML: headings, paragraphs, code and citations."""

from __future__ import annotations

import re
from html import escape

from nnunet_fedharm.evaluation.html import Html


def to_html(content: str) -> Html:
    """Headings of the second level are left out, for the page has its own."""
    parts = []
    for piece in content.strip().split("\n\n"):
        if piece.startswith("### "):
            parts.append(f"<h3>{_inline(piece[4:])}</h3>")
        elif not piece.startswith("## "):
            parts.append(f"<p>{_inline(piece)}</p>")
    return Html("".join(parts))


def _inline(words: str) -> str:
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))
    return re.sub(r"\[@([\w; @]+)\]", r"[\1]", found)

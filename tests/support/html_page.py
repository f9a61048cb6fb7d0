"""What must hold of every page of the reports."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser


class Page(HTMLParser):
    """Every opened element is closed in order; links, pictures and identities are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked_page(text: str) -> Page:
    """A page that is well-formed, needs no network and no script, and whose plots can be read aloud."""
    page = Page(text)
    assert not re.search(r"url\(|@import|http-equiv", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert "src" not in attributes or (attributes["src"] or "").startswith("data:image/png;base64,")
        target = attributes.get("href") or ""
        assert target in ("", "data:,") or not re.match(r"[a-z]+:|//|/", target), target
        assert tag != "img" or attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    return page

"""HTML elements. A tree is serialized at the end, so that text is text wherever it comes from."""

from __future__ import annotations

from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

from yuan_grpc.humaneval.formatting import escape_invisible_lines

Child = Element | str


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """Return an element with text and elements as children.

    Invisible characters of the text and of the attributes are escaped. An underscore at the end of an attribute's name
    is dropped, and one within it becomes a hyphen.
    """
    parent = Element(tag)
    for name, value in attributes.items():
        parent.set(name.rstrip("_").replace("_", "-"), escape_invisible_lines(value))
    extend(parent, children)
    return parent


def extend(parent: Element, children: Iterable[Child]) -> None:
    """Append text and elements to an element."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif len(parent):
            parent[-1].tail = (parent[-1].tail or "") + escape_invisible_lines(child)
        else:
            parent.text = (parent.text or "") + escape_invisible_lines(child)


def serialize(page: Element) -> str:
    """Return a page as HTML."""
    return "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"

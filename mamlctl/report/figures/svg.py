"""Figures as SVG elements of a page: with unique ids, no external references, and the page's colours."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from mamlctl.report.figures.style import BLUE, CALM, DIM, GRID, INK, RED

# The page's CSS variables for these colours, which have other values in dark mode.
COLOURS = {INK: "ink", DIM: "dim", CALM: "calm", GRID: "grid", BLUE: "blue", RED: "red", "#FFFFFF": "paper"}
VARIABLES = {colour.lower(): f"var(--{name})" for colour, name in COLOURS.items()}
LEFT_OUT = ("metadata", "style")  # links to other sites; rules that would apply to the whole page


def inline(svg: bytes, prefix: str, title: str) -> str:
    """Convert an SVG file to an element of a page.

    Args:
        svg: the contents of the file.
        prefix: put before every id, so that ids are unique on the page.
        title: what the figure shows, for screen readers.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in LEFT_OUT:
                parent.remove(child)
    used = {name for element in root.iter() for value in element.attrib.values() for name in _named(value)}
    for element in root.iter():
        _rewrite(element, prefix, used)
    size = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": title}
    root.attrib.clear()
    root.attrib.update(size)
    for element in root.iter():
        element.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _rewrite(element: ElementTree.Element, prefix: str, used: set[str]) -> None:
    element.tag = _local(element.tag)
    attributes = {_local(key): value for key, value in element.attrib.items()}
    name = attributes.pop("id", "")
    if name in used:
        attributes["id"] = prefix + name
    for key, value in attributes.items():
        if key == "d":
            attributes[key] = _shorter(value)
        elif key != "id":
            pointed = re.sub(r"^#|(?<=url\()#", f"#{prefix}", value)
            attributes[key] = _coloured(pointed) if key != "href" else pointed
    element.attrib.clear()
    element.attrib.update(attributes)
    if element.text and not element.text.strip():
        element.text = None


def _local(name: str) -> str:
    """A name without its namespace, which HTML implies."""
    return name.rpartition("}")[2]


def _named(value: str) -> list[str]:
    """The ids that an attribute refers to: '#p1', 'url(#p1)'."""
    return re.findall(r"(?:^|url\()#([\w.-]+)\)?", value)


def _coloured(style: str) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: VARIABLES.get(match[0], match[0]), style)


def _shorter(path: str) -> str:
    """A path on one line, rounded to a hundredth of a point."""
    digits = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path)
    return " ".join(digits.split())

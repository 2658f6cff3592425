"""Pictures as SVG inside a page: no name twice, nothing from elsewhere, ink that follows the page's."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from mamlctl.report.figures.style import BLUE, CALM, DIM, GRID, INK, RED

# The page's own names of these colours, which differ on a dark page.
COLOURS = {INK: "ink", DIM: "dim", CALM: "calm", GRID: "grid", BLUE: "blue", RED: "red", "#FFFFFF": "paper"}
VARIABLES = {colour.lower(): f"var(--{name})" for colour, name in COLOURS.items()}
LEFT_OUT = ("metadata", "style")  # who drew it, with addresses; rules that would hold for the whole page


def inline(svg: bytes, prefix: str, title: str) -> str:
    """An SVG file as an element of a page; `prefix` begins every name in it, `title` is what it shows."""
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
    """A name without its namespace, which a page knows by itself."""
    return name.rpartition("}")[2]


def _named(value: str) -> list[str]:
    """The names that an attribute points at: '#p1', 'url(#p1)'."""
    return re.findall(r"(?:^|url\()#([\w.-]+)\)?", value)


def _coloured(style: str) -> str:
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: VARIABLES.get(match[0], match[0]), style)


def _shorter(path: str) -> str:
    """A path to a hundredth of a point, on one line."""
    digits = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}", path)
    return " ".join(digits.split())

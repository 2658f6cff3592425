"""The documentation as the tests read it: its pages, their code blocks, and the diffs in them."""

import re

from helpers.shared import ROOT

DOCS = ROOT / "mamlctl" / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def code_blocks(text, languages=r"\w*"):
    """The code blocks of a page in these languages, a regular expression."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def documented_diff(section):
    """The diff of a section of contributing.md."""
    text = (DOCS / "contributing.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    (diff,) = code_blocks(text, "diff")
    return diff


def apply_diff(diff, root):
    """Apply a diff whose hunks are found by their text, so that a page needs no line numbers."""
    for part in re.split(r"^(?=--- a/)", diff, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@.*\n", part, flags=re.MULTILINE)
        path = root / re.search(r"^\+\+\+ b/(.+)$", head, re.MULTILINE)[1]
        text = path.read_text()
        for hunk in hunks:
            lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
            old, new = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
            assert text.count(old) == 1, (
                f"{path} has the context of this hunk {text.count(old)} times:\n{hunk}"
            )
            text = text.replace(old, new)
        path.write_text(text)

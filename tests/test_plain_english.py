"""No text of the project uses a phrase that a native engineer would not write."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("mamlctl", "presets", "tests")
FILES = ("README.md", "Makefile", "pyproject.toml")
SUFFIXES = {".py", ".md", ".yaml", ".toml", ".j2", ".c", ".h", ".css"}

COUNTED = (
    "class|classes|queries|query|shots?|images?|examples?|tasks?|seconds?|ms|points?|steps?|MB|bytes?|"
    "numbers?|draws?|times?|rows?|lines?|letters?"
)
UNIT = (
    "class|row|step|task|meta-step|second|line|image|run|set|cell|curve|character|value|layer|seed|node|"
    "worker|batch|epoch|call|file|family"
)
THING = (
    "file|folder|directory|number|image|run|sound|archive|zip|name|preset|setting|list|mapping|picture|"
    "pickle|checkpoint|plan|grid|whole|integer|text|url|pack|data|split|class"
)
# What to write -> phrases to replace by it.
BANNED = {
    "resume, continue or retry": r"\b(?:go|goes|going|gone|went) on\b",
    "again or new": r"\b(?:anew|afresh)\b",
    "fix": r"\bmend(?:s|ed|ing)?\b",
    "remove": r"\b(?:take|takes|taken|taking|took|take it) away\b",
    "name, say, report or show": r"(?<!\.)\b(?:tells?|told)\b",
    "comes from or is obtained": r"\b(?:is|are|was|were) had\b",
    "is": r"\blies\b|\blie (?:in|on|under|beside|below|above|between|there)\b"
    r"|\bstands? (?:in|on|under|beside|below|above|there|for itself|as it)\b|\bit stands\b",
    "per": rf"\b(?:{COUNTED}) an? (?:{UNIT})\b",
    "is not a": rf"(?<!there )\b(?:is|are) no (?:{THING})\b",
    "this long": r"\bso long\b",
    "typo or preference": r"\bslip of the finger\b|\bof a wish\b|\bwish(?:es)?\b",
    "valid": r"\bhonest(?:ly)?\b|\bsanely?\b|\b(?:is|no) sound\b",
    "compared with or checked against": r"\bheld to\b|\bholds? it to\b",
    "print or wait": r"\b(?:speaks?|spoken)\b|(?<!time\.)\bsleeps?\b(?!\()",
    "only": r"\bnothing but\b",
    "as many": r"\bas many as\b",
    "full clauses": r"\bthan as (?:it|they)\b|\bas one\b",
    "warn or report": r"\bwithout a word\b|\bsays? so\b",
    "plain words": r"\b(?:hereby|thereof|thereby|upon|hence|lest|shall|whence|thence)\b"
    r"|\b(?:nobody knows|to be had|for want of|of old|by and by|in vain|for good|at hand)\b"
    r"|\b(?:of its own accord|in the wrong)\b"
    r"|\bout loud\b|\bin front of your eyes\b",
}


def texts():
    """Every text file that people read, except this one."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted({*paths, *(ROOT / name for name in FILES)} - {Path(__file__)})


def test_no_text_uses_a_banned_phrase():
    found = []
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for instead, phrases in BANNED.items():
            for match in re.finditer(phrases, text, re.IGNORECASE):
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{path.relative_to(ROOT)}:{line}: '{match[0]}': write {instead}")
    assert not found, "\n".join(found)

"""Helpers of most tests: the folder of real data, and an `on_event` that drops all events."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def ignore(event):
    """An `on_event` that drops all events."""

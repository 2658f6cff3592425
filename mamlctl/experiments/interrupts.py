"""Requests to stop a run: Ctrl-C, SIGTERM or a time limit."""

from __future__ import annotations

import re
import signal
import time
from types import FrameType

from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.literals import StopReason

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """Seconds of "90", "90s", "9m" or "1h30m". Raises SettingsError for anything else."""
    part = r"(\d+(?:\.\d+)?)([smhd]?)"
    parts = re.findall(part, text) if re.fullmatch(f"({part})+", text.strip()) else []
    seconds = sum(float(number) * UNITS_S[unit or "s"] for number, unit in parts)
    if seconds <= 0:
        raise SettingsError([(f"--time-limit '{text}' is not a duration", "write 90s, 9m or 1h30m")])
    return seconds


class StopRequests:
    """Turns the first SIGINT or SIGTERM in its block into a request; another SIGINT exits at once."""

    def __init__(self, on_event: OnEvent, *, time_limit_s: float | None) -> None:
        """Start the clock; `time_limit_s` is None without a limit."""
        self.started = time.monotonic()
        self._on_event = on_event
        self._deadline = None if time_limit_s is None else self.started + time_limit_s
        self._signal: StopReason = ""
        self._announced = False
        self._previous: dict[signal.Signals, object] = {}

    def reason(self) -> StopReason:
        """The reason to stop, or ""."""
        if self._signal and not self._announced:
            self._announced = True
            self._on_event(Notice(f"{self._signal}: saving; Ctrl-C exits at once without saving"))
        if self._signal:
            return self._signal
        return "time limit" if self._deadline is not None and time.monotonic() >= self._deadline else ""

    def __enter__(self) -> StopRequests:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or ("SIGINT" if number == signal.SIGINT else "SIGTERM")
        text = "stopping after this meta-step; Ctrl-C exits at once without saving"
        self._on_event(Notice(f"{self._signal}: {text}"))

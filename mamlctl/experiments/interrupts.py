"""Requests to stop a run: Ctrl-C, SIGTERM, SIGHUP or a time limit."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from types import FrameType

from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.formatting import parse_seconds
from mamlctl.core.literals import StopReason
from mamlctl.core.process import HANG_UP, interrupt

REASONS: dict[int, StopReason]
REASONS = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM", **dict.fromkeys(HANG_UP, "SIGHUP")}
# A notice where only Ctrl-C reaches a program, as on Windows.
ONLY_CTRL_C = (
    "on this system only Ctrl-C saves a run; ended in another way, it resumes from its last checkpoint"
)


def parse_duration(text: str, option: str = "--time-limit") -> float:
    """The seconds in "90", "90s", "9m" or "1h30m". Raises SettingsError for another value of the option."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise SettingsError([(f"{option} {error}", "write 90s, 9m or 1h30m")]) from error


class StopRequests:
    """Turns the first signal in its block into a request; another SIGINT exits at once."""

    def __init__(self, on_event: OnEvent, *, time_limit_s: float | None) -> None:
        """Start the clock; `time_limit_s` is None without a limit."""
        self.started = time.monotonic()
        self._on_event = on_event
        self._deadline = None if time_limit_s is None else self.started + time_limit_s
        self._signal: StopReason = ""
        self._announced = False
        self._previous: dict[int, object] = {}

    def reason(self) -> StopReason:
        """The reason to stop, or ""."""
        if self._signal and not self._announced:
            self._announced = True
            self._on_event(Notice(f"{self._signal}: saving; Ctrl-C exits at once without saving"))
        if self._signal:
            return self._signal
        return "time limit" if self._deadline is not None and time.monotonic() >= self._deadline else ""

    def __enter__(self) -> StopRequests:
        if not HANG_UP:
            self._on_event(Notice(ONLY_CTRL_C))
        for number in REASONS:
            # nohup ignores SIGHUP, so that the run continues when its terminal closes.
            if number not in HANG_UP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            interrupt(number, frame)
        self._signal = self._signal or REASONS[number]
        text = "stopping after this meta-step; Ctrl-C exits at once without saving"
        # A signal during a write to stderr cannot write there as well; `reason` repeats the notice.
        with suppress(RuntimeError):
            self._on_event(Notice(f"{self._signal}: {text}"))

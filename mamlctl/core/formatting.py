"""Format numbers for people; accuracies are 0..1 in the rest of the code and percent in this text.

`parse_seconds` reads what people write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamlctl.core.literals import Metric

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# A file name may contain escape codes that a terminal would interpret.
CONTROLS = dict.fromkeys([*range(32), *range(127, 160), 0x2028, 0x2029], "?")
PROSE_CONTROLS = {code: sign for code, sign in CONTROLS.items() if chr(code) not in "\n\t"}

# What a spreadsheet takes for the start of a formula, also in full width.
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")

LOSS_NAMES = {
    "cross_entropy": "cross-entropy",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "huber": "Huber loss",
}


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: text that a spreadsheet would run as a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def strip_controls(text: str) -> str:
    """The text with '?' for each control character except newline and tab."""
    return text.translate(PROSE_CONTROLS)


def one_line(text: str) -> str:
    """A name with '?' for each control character, so that it fits into one row of a table."""
    return text.translate(CONTROLS)


def plural(count: int, noun: str) -> str:
    """The singular or plural of a noun: 1 -> 'seed', 3 -> 'seeds', 0 -> 'queries'."""
    if count == 1:
        return noun
    if noun.endswith("y"):
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def with_article(noun: str) -> str:
    """A noun with its article: 'list' -> 'a list', 'int' -> 'an int'."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"


def percent(accuracy: float, digits: int = 1) -> str:
    """0.9312 -> '93.1 %'."""
    return f"{100 * accuracy:.{digits}f} %"


def interval(accuracy: float, ci95: float | None, digits: int = 2) -> str:
    """0.9312, 0.006 -> '93.12 ± 0.60 %'; '± ?' if the width is infinite, no width if it is None.

    Args:
        accuracy: 0..1.
        ci95: half width of the confidence interval, in the unit of the accuracy.
        digits: decimals of the percentages.
    """
    if ci95 is None:
        return percent(accuracy, digits)
    half = f"{100 * ci95:.{digits}f}" if math.isfinite(ci95) else "?"
    return f"{100 * accuracy:.{digits}f} ± {half} %"


def score(metric: Metric, value: float, ci95: float | None, digits: int = 2) -> str:
    """A score with the half width of its interval: an accuracy in percent, or a mean squared error.

    Args:
        metric: what the score is.
        value: an accuracy 0..1, or a mean squared error.
        ci95: half width of the confidence interval, in the same unit; None for no interval.
        digits: decimals of an accuracy's percentages; an error always has three.
    """
    if metric == "accuracy":
        return interval(value, ci95, digits)
    half = "" if ci95 is None else f" ± {ci95:.3f}" if math.isfinite(ci95) else " ± ?"
    return f"{value:.3f}{half}"


def signed(metric: Metric, value: float) -> str:
    """A signed difference: '+1.23' percentage points, '-0.012' for an mse, '?' if it is not finite."""
    if not math.isfinite(value):
        return "?"
    scale, digits = (100, 2) if metric == "accuracy" else (1, 3)
    return f"{round(scale * value, digits) + 0.0:+.{digits}f}"  # + 0.0 turns -0.00 into 0.00


def minus_signs(text: str) -> str:
    """The text with a true minus sign, U+2212, before each negative number: '-0.22' -> '−0.22'."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def task(dataset: str, ways: int, shots: int) -> str:
    """'omniglot 5-way 1-shot', or 'sinusoid 5-shot' for curves; an image folder is shown by its name.

    Args:
        dataset: the name of a data set, or the path of an image folder.
        ways: classes per task; 1 for curves.
        shots: support examples per class.
    """
    dataset = Path(dataset).name
    return f"{dataset} {ways}-way {shots}-shot" if ways > 1 else f"{dataset} {shots}-shot"


def reported(metric: Metric, loss: float) -> float:
    """A loss of a training report as people read it: of policies the mean return, which is minus the loss."""
    return -loss if metric == "return" else loss


def loss(value: float) -> str:
    """A loss with four decimals, in at most nine characters even if it explodes."""
    return f"{value:.4f}" if abs(value) < 1000 or not math.isfinite(value) else f"{value:.2e}"


def loss_name(loss: str) -> str:
    """A loss of --loss in words; the user's own one by its file, without folders, and its function."""
    place, colon, name = loss.rpartition(":")
    return f"{Path(place).name}:{name}" if colon else LOSS_NAMES[loss]


def clock(seconds: float | None) -> str:
    """'1:12', '2:13:40' or '3 d 04 h'; '-:--' if the time is unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, last_seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{hours}:{minutes:02}:{last_seconds:02}" if hours else f"{minutes}:{last_seconds:02}"


def duration(seconds: float) -> str:
    """'26.4 ms', '2.41 s' or '72 s'; from two minutes on as `clock`."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    return f"{seconds:.0f} s" if seconds < 120 else clock(seconds)


def parse_seconds(text: str) -> float:
    """Seconds of "90", "90s", "9m" or "1h30m". Raises ValueError for anything else, and for 0."""
    # Only the last unit is optional: a longer text would match in exponentially many ways.
    number, unit = r"\d+(?:\.\d+)?", "[smhd]"
    is_valid = re.fullmatch(f"(?:{number}{unit})*{number}{unit}?", text.strip())
    parts = re.findall(f"({number})({unit}?)", text) if is_valid else []
    seconds = sum(float(number) * UNITS_S[unit or "s"] for number, unit in parts)
    if not 0 < seconds < math.inf:
        raise ValueError(f"'{text}' is not a duration")
    return seconds


def size(count: int) -> str:
    """1288490188 -> '1.2 GiB'."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def amount(done: int, total: int, unit: str = "", per_second: float | None = None) -> str:
    """'12/600', or with unit "B" '4.2/9.0 MiB  1.3 MiB/s'; an unknown total (0) or speed is omitted.

    Args:
        done: items, or bytes, finished so far.
        total: all of them.
        unit: "B" for bytes.
        per_second: bytes per second.
    """
    if unit != "B":
        return f"{done:,}/{total:,}" if total else f"{done:,}"
    so_far, whole = size(done), size(total)
    if so_far.split()[1] == whole.split()[1]:
        so_far = so_far.split()[0]
    speed = "" if per_second is None else f"  {size(round(per_second))}/s"
    return f"{so_far}/{whole}{speed}" if total else f"{size(done)}{speed}"


def elide_middle(text: str, width: int) -> str:
    """The text shortened to `width` in its middle, since both ends of a run's name carry information."""
    if len(text) <= width:
        return text
    head = max(width - 1, 0) // 2
    tail = max(width - 1 - head, 0)
    return f"{text[:head]}…{text[len(text) - tail :]}"


def evenly_spaced(count: int, room: int) -> Sequence[int]:
    """At most `room` of the indices 0..count-1, evenly spaced and including the first and the last."""
    if count <= room:
        return range(count)
    if room < 2:
        return [count - 1][:room]
    return [round(place * (count - 1) / (room - 1)) for place in range(room)]

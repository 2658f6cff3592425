"""Tables and a JSON document of the rows."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from benchmarks.cases import GROWTH, OTHERS, PEER_CASES
from benchmarks.flops import meta_step_flops
from benchmarks.rounds import Row

VERSION = 1  # of the JSON document
COLUMNS = (
    "case", "order", "learner", "s/meta-step", "min-max", "n", "vs plain", "tasks/s", "peak MiB", "GFLOP",
    "GFLOP/s", "of matmul",
)  # fmt: skip
FOOTER = (
    "Images are random numbers, which need the same arithmetic as real ones. GFLOP: counted from shapes, for "
    "convolutions and head only, without recomputation. Peak: resident memory of the learner's process, "
    "including torch (CUDA: allocated by torch). Of matmul: share of the speed of square matrix products."
)
PEERS_FOOTER = (
    "The libraries' norms have no weights and their inner rates are fixed, so they do slightly less work. "
    "Their meta-gradients equal the plain engine's (tests/test_benchmarks.py). official: Antoniou's code."
)
Rates = Mapping[str, float]  # precision -> GFLOP/s of matrix products


def matrix_rates(seconds: Mapping[str, Sequence[float]], flops: int) -> dict[str, float]:
    """Return the GFLOP/s of the median matrix product per precision."""
    return {precision: flops / statistics.median(found) / 1e9 for precision, found in seconds.items()}


def numbers(row: Row, rates: Rates) -> dict[str, Any]:
    """Return the numbers that a table shows for a row; a skipped row only has those from its shapes."""
    gflop = meta_step_flops(row.case) / 1e9
    shapes = {"gflop": gflop, "n": len(row.seconds)}
    if not row.seconds:
        return shapes
    median = statistics.median(row.seconds)
    return shapes | {
        "median_s": median,
        "min_s": min(row.seconds),
        "max_s": max(row.seconds),
        "tasks_per_second": row.case.tasks / median,
        "gflop_per_second": gflop / median,
        "share_of_matmul": gflop / median / rates[row.precision],
    }


def document(
    rows: Iterable[Row], machine: Mapping[str, Any], rates: Mapping[str, Any], **head: Any
) -> dict[str, Any]:
    """Return the whole run as a JSON object, with every measured time in `rows`."""
    gflops = {precision: rate["gflop_per_second"] for precision, rate in rates.items()}
    return {
        "version": VERSION,
        **head,
        "machine": dict(machine),
        "matrix_products": dict(rates),
        "rows": [vars(row) | {"case": row.case.document()} | numbers(row, gflops) for row in rows],
    }


def main_table(rows: Sequence[Row], rates: Rates) -> Table:
    """Return the table of mamlctl's engines in every case."""
    shown = [row for row in rows if row.part == "main" and row.learner not in OTHERS]
    return _table("Meta-steps", shown, rows, rates, FOOTER)


def peers_table(rows: Sequence[Row], rates: Rates) -> Table | None:
    """Return the table of the cases that peers ran, with mamlctl's engines, or None."""
    others = {row.case for row in rows if row.learner in OTHERS and row.case.name in PEER_CASES}
    shown = [row for row in rows if row.part == "main" and row.case in others]
    return _table("The same meta-step by others", shown, rows, rates, PEERS_FOOTER) if shown else None


def _table(title: str, shown: Sequence[Row], rows: Sequence[Row], rates: Rates, footer: str) -> Table:
    reasons = dict.fromkeys(f"{row.learner} skipped: {row.skipped}" for row in shown if row.skipped)
    caption = Text("\n".join([*reasons, footer]))
    table = Table(title=title, caption=caption, caption_justify="left", title_justify="left")
    for column in COLUMNS:
        table.add_column(
            column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=column in COLUMNS[:3]
        )
    for number, row in enumerate(shown):
        new = number == 0 or shown[number - 1].case != row.case
        if new and number:
            table.add_section()
        head = [row.case.name, row.case.order] if new else ["", ""]
        table.add_row(*head, row.learner, *_cells(row, rows, rates))
    return table


def _cells(row: Row, rows: Sequence[Row], rates: Rates) -> list[str]:
    if row.skipped:
        return ["skipped"]
    found = numbers(row, rates)
    plain = [
        other for other in rows if (other.part, other.case, other.learner) == (row.part, row.case, "plain")
    ]
    faster = statistics.median(plain[0].seconds) / found["median_s"] if plain and plain[0].seconds else None
    return [
        f"{found['median_s']:.4g}",
        f"{found['min_s']:.4g}-{found['max_s']:.4g}",
        str(found["n"]),
        f"{faster:.2f}x" if faster else "",
        f"{found['tasks_per_second']:.4g}",
        mebibytes(row.peak_bytes),
        f"{found['gflop']:.4g}",
        f"{found['gflop_per_second']:.4g}",
        f"{found['share_of_matmul']:.0%}",
    ]


def growth_table(axis: str, rows: Sequence[Row]) -> Table:
    """Return the table of time and peak memory per engine along one axis."""
    shown = [row for row in rows if row.part == axis]
    learners = list(dict.fromkeys(row.learner for row in shown))
    base = shown[0].case
    caption = f"{base.name}, {base.order} order, n = {max(len(row.seconds) for row in shown)} each"
    table = Table(title=f"By {axis}", caption=caption, caption_justify="left", title_justify="left")
    table.add_column(axis, justify="right")
    for learner in learners:
        for column in ("s/meta-step", "min-max", "peak MiB", "of it before"):
            table.add_column(f"{learner}\n{column}", justify="right")
    for value in GROWTH[axis]:
        cells = [str(value)]
        for learner in learners:
            cells += _growth_cells(
                [r for r in shown if r.learner == learner and getattr(r.case, axis) == value]
            )
        table.add_row(*cells)
    return table


def _growth_cells(found: Sequence[Row]) -> list[str]:
    """Return the cells of the only row, if there is one."""
    if not found or found[0].skipped or not found[0].seconds:
        return ["skipped" if found else "", "", "", ""]
    row = found[0]
    return [
        f"{statistics.median(row.seconds):.4g}",
        f"{min(row.seconds):.4g}-{max(row.seconds):.4g}",
        mebibytes(row.peak_bytes),
        mebibytes(row.idle_bytes),
    ]


def mebibytes(count: int) -> str:
    """Format bytes as whole MiB."""
    return f"{count / 2**20:.0f}"

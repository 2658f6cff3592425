"""Formatting of numbers and nouns."""

from __future__ import annotations

import math

import pytest

from mamlctl.core import formatting


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-:--"), (math.nan, "-:--"), (-3, "0:00"), (72, "1:12"), (8020, "2:13:40"), (273600, "3 d 04 h")],
)
def test_clock(seconds: float | None, text: str):
    assert formatting.clock(seconds) == text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "＝"])
def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe(start: str):
    assert formatting.csv_cell(f"{start}1+1") == f"'{start}1+1"
    for value in (f"a{start}1", "", -1.5, -1, None):
        assert formatting.csv_cell(value) is value


def test_durations_amounts_and_sizes_are_formatted():
    assert [formatting.duration(s) for s in (0.0264, 2.4141, 71.9, 130, math.nan)] == [
        "26.4 ms",
        "2.41 s",
        "72 s",
        "2:10",
        "-",
    ]
    assert formatting.amount(1200, 3000) == "1,200/3,000"
    assert formatting.amount(1200, 0) == "1,200"
    assert formatting.amount(2**21, 9 * 2**20, "B", 2**20) == "2.0/9.0 MiB  1.0 MiB/s"
    assert formatting.amount(2**19, 9 * 2**20, "B") == "512.0 KiB/9.0 MiB"
    assert formatting.amount(2**19, 0, "B", 2048.0) == "512.0 KiB  2.0 KiB/s"
    assert [formatting.size(count) for count in (12, 2048, 3 * 2**29)] == ["12 B", "2.0 KiB", "1.5 GiB"]
    assert formatting.elide_middle("runs/abcdefgh", 7) == "run…fgh"
    assert [list(formatting.evenly_spaced(*case)) for case in ((3, 5), (21, 3), (9, 1), (9, 0), (9, -2))] == [
        [0, 1, 2],
        [0, 10, 20],
        [8],
        [],
        [],
    ]


def test_durations_are_parsed():
    texts = ["90", "90s", " 9m ", "1h30m", "1.5h", "1d2h3m4.5", "5m5m"]
    assert [formatting.parse_seconds(text) for text in texts] == [90, 90, 540, 5400, 5400, 93784.5, 600]


@pytest.mark.parametrize(
    "text", ["", "0", "soon", "m", "-1", "1e3", "1 h", "10.15.30", "1" * 400, "1" * 40 + "x"]
)
def test_text_that_is_not_a_duration_is_refused_at_once(text):
    with pytest.raises(ValueError, match="is not a duration"):
        formatting.parse_seconds(text)


@pytest.mark.parametrize(
    ("count", "noun", "form"),
    [
        (1, "seed", "seed"),
        (2, "seed", "seeds"),
        (0, "seed", "seeds"),
        (1, "query", "query"),
        (3, "query", "queries"),
        (2, "class", "classes"),
    ],
)
def test_nouns_agree_with_their_count(count: int, noun: str, form: str):
    assert formatting.plural(count, noun) == form

"""A frame of the live view shows the state of the run, and fits its terminal."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
from helpers.display_cases import RUN, VALIDATION, a_report, frame, state_after
from rich.cells import cell_len

from mamlctl.core import formatting
from mamlctl.core.events import MetaStepDone, Progress, Waiting
from mamlctl.display.live_state import LiveState, advance
from mamlctl.display.training_view import render

SIZES = [(80, 24), (100, 30), (120, 40), (200, 60), (60, 15), (40, 8), (10, 2)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("inner_steps", [1, 5, 20])
def test_every_frame_fits_its_terminal(width: int, height: int, inner_steps: int):
    run = replace(RUN, inner_steps=inner_steps, run="runs/" + "long-name-" * 30, device="d" * 90)
    reports = [a_report(step, inner_steps) for step in range(1, 60)]
    states = [state_after(), state_after(Progress("packing", 1, 9)), state_after(run)]
    states.append(state_after(run, *reports, VALIDATION, Progress("validating", 200, 600)))
    for state in states:
        lines = frame(state, width, height)
        assert len(lines) <= height
        assert max(map(cell_len, lines), default=0) <= width


@pytest.mark.parametrize(("width", "height"), [(80, 23), (120, 39)])
def test_a_frame_shows_everything_about_a_training(width: int, height: int):
    text = "\n".join(frame(state_after(RUN, MetaStepDone(30, 0), a_report(), VALIDATION), width, height))
    for shown in (
        "maml++",
        "msl da bnrs bnwb lslr ca",
        "omniglot 20-way 1-shot",
        "112,084 parameters",
        "cpu",
        "epoch 1/10",
        "30/50",
        "30/500",
        "support loss 0.8120",
        "meta lr 0.001",
        "first order",
        "3.0000",
        "1.5000",
        "0.5000",
        "95.0 %",
        "chance: 2.9957, 5.0 %",
        "1.00",
        "tasks/s 38.1",
        "meta-step 210 ms",
        "memory 1.5 GiB",
        "93.12 ± 0.61 % epoch 1",
        "bn transductive",
        "600 tasks",
        "Learnt inner rates",
        "step 5",
        "conv1.weight",
        "0.1400",
    ):
        assert shown in text, shown
    assert "second order" in "\n".join(frame(state_after(RUN, a_report(first_order=False)), width, height))


def test_a_high_speed_has_thousands_separators():
    assert "tasks/s 12,345.6 " in "\n".join(
        frame(state_after(RUN, a_report(tasks_per_second=12345.6)), 80, 24)
    )


def test_rates_are_left_out_if_lines_are_few_or_rates_are_fixed():
    state = state_after(RUN, a_report(), VALIDATION)
    assert "linear.bias" in "\n".join(frame(state, 80, 40))
    small = "\n".join(frame(state, 80, 19))
    assert "LSLR" not in small
    assert "93.12" in small
    assert "LSLR" not in "\n".join(frame(state_after(RUN, a_report(rates={})), 80, 40))


def test_too_many_inner_steps_are_thinned_out_except_for_the_first_and_the_last():
    lines = frame(state_after(replace(RUN, inner_steps=20), a_report(inner_steps=20)), 80, 24)
    rows = [int(match[1]) for line in lines if (match := re.match(r" {1,4}(\d+)  .*[█▏▎▍▌▋▊▉]", line))]
    assert rows[0] == 0
    assert rows[-1] == 20
    assert rows == sorted(set(rows))
    assert 5 < len(rows) < 21


def test_weights_of_the_multi_step_loss_are_shown_per_step():
    rows = {}
    for epoch, weights in (("early", (0.2,) * 5), ("late", (0.0, 0.0, 0.0, 0.0, 1.0))):
        lines = frame(state_after(RUN, a_report(msl_weights=weights)), 80, 24)
        rows[epoch] = [line.split()[1:3] for line in lines if re.match(r"    [0-5]  ", line)]
    assert [row[0] for row in rows["early"]] == ["–", "▂", "▂", "▂", "▂", "▂"]
    assert rows["early"][1][1] == "0.20"
    assert [row[0] for row in rows["late"]] == ["–"] * 5 + ["█"]


def test_the_level_of_chance_is_that_of_the_larger_problem_while_only_the_body_is_trained():
    run = replace(RUN, body_epochs=2)  # 8 tasks of 20 classes are one problem of 160
    for epoch, shown in ((1, "chance: 5.0752, 0.6 %"), (2, "chance: 2.9957, 5.0 %")):
        assert shown in "\n".join(frame(state_after(run, a_report(epoch=epoch)), 80, 40))


def test_the_name_of_another_loss_is_shown_and_its_level_of_chance_is_unknown():
    accuracies = {"query_losses": (-0.5, 0.25, 7.0), "query_accuracies": (0.1, 0.2, 0.3)}
    classes = replace(RUN, loss="loss.py:smooth")
    text = "\n".join(frame(state_after(classes, a_report(inner_steps=2, **accuracies)), 120, 39))
    assert "loss.py:smooth · ┊ chance: 5.0 %" in text and "2.9957" not in text and "-0.5000" in text
    values = replace(RUN, metric="mse", guesses=0)
    report = a_report(query_accuracies=(), query_accuracy=None)
    assert "mean squared error" in "\n".join(frame(state_after(values, report), 120, 20))
    other = "\n".join(frame(state_after(replace(values, loss="Huber loss"), report), 120, 20))
    assert "Huber loss" in other and "mean squared error" not in other


def test_a_tall_terminal_has_a_chart_of_the_loss_history_and_a_small_one_sparklines():
    state = state_after(RUN, *(a_report(step) for step in range(1, 60)), VALIDATION)
    for width, height, tall in ((80, 23, False), (120, 39, True), (80, 39, True), (120, 29, False)):
        text = "\n".join(frame(state, width, height))
        assert ("Loss history ──" in text) == tall
        assert ("log scale · ┈ chance: 2.9957" in text) == tall
        assert (re.search("accuracy +loss history", text) is None) == tall
    assert "chance" not in "\n".join(frame(state_after(replace(RUN, guesses=0), a_report()), 120, 39))


def test_a_frame_depends_only_on_the_state_and_the_size():
    state = state_after(RUN, *(a_report(step) for step in range(1, 60)), VALIDATION)
    other = state_after(RUN, a_report(query_losses=(9.0,) * 6))
    first = frame(state, 80, 60)
    assert frame(state, 120, 60) != first != frame(other, 80, 60)
    assert frame(state, 80, 60) == first


def test_the_loss_chart_covers_the_whole_run_however_long():
    state = LiveState(0.0)
    for step in range(1, 5000):
        state = advance(state, a_report(step), float(step))
    steps = [point.step for point in state.losses]
    assert (steps[0], steps[-1]) == (1, 4999)
    assert 150 <= len(steps) <= 400
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert max(gaps) <= 2 * max(gaps[:50])


def test_rates_are_coloured_by_their_change_since_the_start():
    def cells(*rates: float) -> list[tuple[str, str]]:
        report = a_report(inner_steps=len(rates), rates={"conv1.weight": rates})
        lines = render(state_after(RUN, report), 140, 23).renderables
        (line,) = [line for line in lines if "conv1.weight" in line.plain]
        return [
            (line.plain[span.start : span.end].split()[0], span.style) for span in line.spans[-len(rates) :]
        ]

    (below, below_colour), (above, above_colour) = cells(0.099, 0.101)
    assert below == above == "▄"
    channels = [
        [int(number) for number in re.findall(r"\d+", colour)] for colour in (below_colour, above_colour)
    ]
    assert max(abs(a - b) for a, b in zip(*channels, strict=True)) <= 3
    blocks, colours = zip(*cells(-0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.9), strict=True)
    assert blocks == ("▁", "▁", "▂", "▄", "▆", "█", "█")
    assert len(set(colours)) == 5, "colours end at 0 and at twice the start"
    assert "step 5 start 0.1" in "\n".join(frame(state_after(RUN, a_report()), 80, 23))


def test_before_the_first_report_the_view_says_what_is_waited_for():
    state = state_after(Waiting("loading torch", "training maml++ on omniglot"), Waiting("loading omniglot"))
    assert frame(replace(state, now=4.9), 80, 23) == [
        " training maml++ on omniglot",
        " loading torch 1.0 s · loading omniglot 2 s",
    ]
    state = advance(state, Waiting("compiling kernels"), 5.0)
    state = advance(state, RUN, 8.5)
    assert frame(replace(state, now=20.0), 80, 23)[-1] == (
        " loading omniglot 3.0 s · compiling kernels 3.5 s · first meta-step 11 s"
    )
    assert frame(replace(state, now=20.0), 120, 39)[-1].startswith(" loading torch 1.0 s · loading omni")
    between = advance(state_after(Waiting("loading torch", "testing x")), Progress("reading", 1, 9), 5.5)
    between = advance(between, Waiting("compiling kernels"), 7.5)
    assert frame(between, 80, 23) == [" testing x", " loading torch 4.5 s · compiling kernels 0 s"]
    for second in (8.0, 8.5, 9.0):
        between = advance(between, Waiting("loading x"), second)
    assert frame(between, 80, 23)[1] == " loading torch 4.5 s · compiling kernels 0.5 s · loading x 0 s"
    state = advance(state, MetaStepDone(1, 0), 21.0)
    assert "first meta-step" not in "\n".join(frame(state, 120, 39))
    assert "first meta-step" not in "\n".join(frame(advance(state, a_report(1), 22.0), 120, 39))


def test_losses_that_are_not_finite_are_shown_as_nan_or_inf():
    losses = (3.0, math.nan, math.inf, -math.inf, 1e30, 0.4)
    report = a_report(query_losses=losses, support_loss=math.nan, meta_loss=math.inf, tasks_per_second=0.0)
    rates = {"conv1.weight": (math.nan, 0.1, math.inf, 0.1, -0.2)}
    text = "\n".join(
        frame(state_after(replace(RUN, ways=2, guesses=2), a_report(), replace(report, rates=rates)), 80, 40)
    )
    for shown in ("nan", "inf", "-inf", "1.00e+30", "support loss nan", "chance: 0.6931, 50.0 %", "-0.2000"):
        assert shown in text
    assert "·" in text.split("Per-step losses")[1]


def test_bars_advance_with_meta_steps_and_show_the_time_left():
    def filled(state: LiveState) -> list[int]:
        return [line.count("━") for line in frame(state, 120, 40)[2:] if "━" in line or " left" in line]

    start = state_after(RUN, MetaStepDone(1, 0), a_report(1))
    later = advance(start, MetaStepDone(25, 0), 9.0)
    assert filled(later)[0] > filled(start)[0]
    assert filled(later)[1] >= filled(start)[1]
    text = "\n".join(frame(later, 120, 40))
    assert "25/50" in text
    assert "25/500" in text
    # meta-steps left * tasks per meta-step / tasks per second
    assert formatting.clock(25 * 8 / 38.1) + " left" in text
    assert formatting.clock(475 * 8 / 38.1) + " left" in text


def test_the_time_left_of_the_run_includes_future_validations():
    state = state_after(RUN, MetaStepDone(50, 0), a_report(50))
    state = advance(state, Progress("validating", 300, 600), 13.0)
    state = advance(state, replace(VALIDATION, step=50), 23.0)
    assert state.validation_s == 20.0  # from the event before the first progress, at 3 s
    assert formatting.clock(450 * 8 / 38.1 + 9 * 20) + " left" in "\n".join(frame(state, 80, 24))


def test_other_work_is_a_third_bar_while_it_is_in_progress():
    state = state_after(RUN, a_report(), Progress("validating", 200, 600))
    assert any("validating" in line and "200/600" in line for line in frame(state, 80, 24))
    state = advance(state, VALIDATION, 9.0)
    assert not any("validating" in line for line in frame(state, 80, 24))
    download = state_after(Progress("download a.zip", 2**20, 9 * 2**20, "B", 2.0**20))
    assert "1.0/9.0 MiB  1.0 MiB/s      0:08 left" in frame(download, 80, 24)[0]
    long = [Progress(f"download images_{part}.zip", 1, 2, "B") for part in ("background", "evaluation")]
    rows = [line.split(" ━")[0] for line in frame(state_after(*long), 80, 24)]
    assert len(set(rows)) == 2, "two files must be distinguishable"


def test_a_resumed_run_starts_where_it_stopped_and_shows_the_best_score_so_far():
    text = "\n".join(
        frame(
            state_after(
                replace(RUN, first_step=120),
                MetaStepDone(121, 2),
                a_report(121),
                replace(VALIDATION, epoch=3, best_epoch=2, best_val_score=0.9555, best_val_ci95=0.0049),
            ),
            80,
            24,
        )
    )
    assert "epoch 3/10" in text
    assert " 21/50 " in text
    assert "121/500" in text
    assert "best 95.55 ± 0.49 % epoch 2" in text


def test_a_run_of_policies_shows_returns_instead_of_losses():
    run = replace(RUN, dataset="navigation", algo="maml", improvements=(), ways=1, metric="return", guesses=0)
    report = a_report(inner_steps=1, query_losses=(21.5, 3.25), query_accuracies=(), query_accuracy=None)
    done = replace(VALIDATION, metric="return", val_score=-3.5, best_val_score=-3.5)
    lines, narrow = ("\n".join(frame(state_after(run, report, done), 100, height)) for height in (60, 20))
    for text in (
        "Per-step returns",
        "mean return",
        "-21.5000",
        "-3.2500",
        "Return history",
        "mean return -0.5230",
        "meta lr 0.001",
        "-3.500",
    ):
        assert text in lines or text in narrow, text
    assert "loss" not in lines + narrow and "squared" not in lines
    trpo = frame(state_after(run, replace(report, meta_lr=None), done), 100, 60)
    assert "meta lr" not in "\n".join(trpo) and len(trpo) == len(lines.splitlines())


def test_histories_of_returns_rise_when_returns_rise():
    run = replace(RUN, dataset="navigation", algo="maml", ways=1, metric="return", guesses=0)
    losses = [20.0, 10.0, 5.0, 1.0]
    reports = [
        a_report(step, inner_steps=1, query_losses=(loss, loss), query_accuracies=(), query_accuracy=None)
        for step, loss in enumerate(losses, 1)
    ]
    narrow = frame(state_after(run, *reports), 80, 20)
    sparks = [line.split()[-1] for line in narrow if line.split()[:1] in (["0"], ["1"])]
    assert sparks == ["▁▅▇█"] * 2

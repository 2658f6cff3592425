"""Terminal output: the live view and plain lines, errors, results and JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from helpers.display_cases import RUN, VALIDATION, a_report, frame, state_after
from rich.console import Console

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import CellState, GridChanged, MetaStepDone, Notice, Progress, Waiting
from mamlctl.core.results import EvalResult, EvalRow, TrainResult
from mamlctl.display.console import say_table, show_error, stderr_console, write_json
from mamlctl.display.displays import LiveDisplay, PlainDisplay, SilentDisplay, open_display
from mamlctl.display.run_results import show_eval_result, show_train_result
from mamlctl.display.training_view import render


@pytest.fixture(autouse=True)
def capable_terminal(monkeypatch: pytest.MonkeyPatch):
    """The environment in which the tests run must not affect their terminals."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(file=Tty(), width=width, height=height, force_terminal=True, legacy_windows=False)


def pipe() -> Console:
    return Console(file=StringIO(), width=40, force_terminal=False)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


class Tty(StringIO):
    """A file that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_markup_and_control_codes_in_names_are_not_interpreted():
    run = replace(RUN, run="runs/[red]x[/x]:smile:\x1b[2J", dataset="[bold]omni", device="[/]")
    text = "\n".join(frame(state_after(run, a_report()), 120, 40))
    assert "runs/[red]x[/x]:smile:?[2J" in text
    assert "[bold]omni" in text
    for console in (terminal(), pipe()):
        show_error(console, MamlctlError("no folder data[/x]:smile:", hint="try [red]y"))
        assert "no folder data[/x]:smile:" in written(console)
        assert "try [red]y" in written(console)


def test_a_line_break_in_a_name_does_not_split_a_line():
    console = pipe()
    say_table(console, [["file", "label"], ["a\nb.png", "x\ty\x85z\u2028"], ["c.png", "d"]], left=2)
    assert written(console) == "file     label\na?b.png  x?y?z?\nc.png    d\n"
    run = replace(RUN, run="runs/a\nb", dataset="photos\nx")
    assert any("runs/a?b" in line for line in frame(state_after(run, a_report()), 120, 40))
    display = PlainDisplay(pipe())
    display(run)
    display(Notice("left out: a\nb"))
    assert written(display.console).count("\n") == 2


def test_stderr_that_cannot_be_written_is_discarded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "full").symlink_to("/dev/full")
    with (tmp_path / "full").open("w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        display = PlainDisplay(stderr_console())
        for _ in range(3):
            display(Notice("x"))


def test_the_live_view_draws_on_a_terminal_and_keeps_its_last_frame():
    console = terminal()
    with open_display(console, quiet=False) as display:
        assert isinstance(display, LiveDisplay)
        for event in (Notice("made [now]"), RUN, MetaStepDone(30, 0), a_report(), VALIDATION):
            display(event)
    text = plain(written(console))
    assert "made [now]" in text
    assert "0.5000" in text
    assert "93.12 ± 0.61 %" in text
    assert written(console).endswith("\x1b[?25h")  # the cursor is visible again


def test_a_live_view_without_events_writes_nothing():
    console = terminal()
    with open_display(console, quiet=False):
        pass
    assert written(console) == ""


def test_what_a_command_waits_for_is_shown_in_place_and_leaves_no_trace():
    console = terminal()
    with LiveDisplay(console) as display:
        display(Waiting("loading torch", "training maml++ on glyphs"))
        first = written(console)
        assert plain(first) == " training maml++ on glyphs\n loading torch 0 s\n"
    last = written(console).removeprefix(first)
    assert plain(last).split() == ["training", "maml++", "on", "glyphs"], "the waits are over"
    assert last.endswith("\n\x1b[?25h\r\x1b[1A\x1b[2K"), "and this line is erased"
    for _ in range(2):
        console = pipe()
        with open_display(console, quiet=False) as plain_display:
            plain_display(Waiting("loading torch", "training maml++ on glyphs"))
        assert written(console) == ""


def test_an_error_after_the_start_of_a_run_keeps_the_last_frame_without_waits():
    console = terminal()
    with LiveDisplay(console) as display:
        display(Waiting("loading torch", "training maml++ on glyphs"))
        display(RUN)
    last = plain(written(console).rpartition("\x1b[2K")[2])
    assert "epoch 1/10" in last
    assert "loading torch" not in last and "first meta-step" not in last


def test_a_resize_clears_the_screen():
    console = terminal(120, 40)
    with LiveDisplay(console) as display:
        display(RUN)
        before = written(console).count("\x1b[2J")
        console.size = (80, 24)  # type: ignore[assignment]
    assert before == 0
    assert written(console).count("\x1b[2J") == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_cursor_waits_where_the_echo_of_ctrl_c_begins_no_line(width):
    bar = Progress("validating", 200, 600)  # a line of the whole width
    grid = GridChanged("omniglot", "accuracy", 1, (CellState("maml", 0, "testing", 9, 9),), 7.0)
    for event in (bar, grid):
        console = terminal(width)
        with LiveDisplay(console) as display:
            display(event)
            last = plain(written(console)).split("\n")[-1]
        assert len(last) <= width - len("^C"), last


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch):
    colour = re.compile(r"\x1b\[(?:[12];)?3[0-9]")
    for expected in (True, False):
        console = terminal()
        console.print(render(state_after(RUN, a_report()), 80, 24))
        assert bool(colour.search(written(console))) is expected
        monkeypatch.setenv("NO_COLOR", "1")


def test_a_pipe_gets_one_plain_line_per_report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # forces colours, but must not force cursor movements
    console = Console(file=StringIO(), width=40)
    with open_display(console, quiet=False) as display:
        assert isinstance(display, PlainDisplay)
        for event in (Notice("made [now]"), RUN, MetaStepDone(30, 0), a_report(), VALIDATION):
            display(event)
    assert "\x1b" not in written(console)
    assert written(console).splitlines() == [
        "made [now]",
        "run runs/omniglot-20w1s-maml++-s0  maml++ (msl da bnrs bnwb lslr ca)  omniglot 20-way 1-shot  "
        "8 tasks per meta-step  112,084 parameters  bn transductive  cpu (x86_64, 2 threads)",
        "step 30/500  epoch 1/10  support 0.812  query 3.000>1.500>1.000>0.750>0.600>0.500  acc 95.0 %  "
        "lr 0.00100  order 1  38.1 tasks/s",
        "epoch 1/10  val 93.1 ± 0.6 % (600 tasks, transductive)  best 93.1 % at epoch 1",
    ]


def test_a_plain_line_of_policies_has_returns_and_no_rate_inside_a_trust_region():
    console, run = pipe(), replace(RUN, metric="return", guesses=0, bn="none")
    changes = {"query_losses": (21.5, 3.25), "query_accuracies": (), "query_accuracy": None}
    with open_display(console, quiet=False) as display:
        done = replace(
            VALIDATION, metric="return", bn="none", val_score=-3.5, best_val_score=-3.5, val_ci95=0.5
        )
        for event in (run, a_report(**changes), a_report(**changes, meta_lr=None), done):
            display(event)
    lines = written(console).splitlines()
    assert "bn" not in lines[0].split()
    assert lines[1:] == [
        "step 30/500  epoch 1/10  return -21.500>-3.250  lr 0.00100  order 1  38.1 tasks/s",
        "step 30/500  epoch 1/10  return -21.500>-3.250  order 1  38.1 tasks/s",
        "epoch 1/10  val -3.500 ± 0.500 (600 tasks)  best -3.500 at epoch 1",
    ]


def test_plain_progress_is_rare():
    now = [0.0]
    console = pipe()
    display = PlainDisplay(console, clock=lambda: now[0])
    for done in range(0, 1001):  # 1,000 parts in 100 seconds
        now[0] = done / 10
        display(Progress("packing", done, 1000))
    lines = written(console).splitlines()
    assert lines[0] == "packing  10 %  100/1,000"
    assert lines[-1] == "packing  100 %  1,000/1,000"
    assert len(lines) == 10
    for done in range(0, 1001):  # quick work has no lines
        now[0] += 0.001
        display(Progress("validating", done, 1000))
    for _ in range(9):  # nine validations, each of a single part
        now[0] += 10
        display(Progress("validating", 40, 40))
    assert len(written(console).splitlines()) == 10


def test_characters_that_the_encoding_lacks_become_question_marks():
    class Ascii(Tty):
        encoding = "ascii"

    console = Console(file=Ascii(), force_terminal=True, legacy_windows=False)
    with open_display(console, quiet=False) as display:
        display(VALIDATION)
    assert "93.1 ? 0.6 %" in written(console)


def test_quiet_is_silent():
    console = terminal()
    with open_display(console, quiet=True) as display:
        assert isinstance(display, SilentDisplay)
        for event in (Notice("made"), RUN, a_report(), VALIDATION):
            display(event)
    assert written(console) == ""


def test_an_error_is_two_lines_in_a_pipe_and_coloured_on_a_terminal():
    error = MamlctlError(
        "mini-imagenet 'test' has 20 classes, but --ways is 25", hint="use --ways 20 or fewer"
    )
    console = pipe()  # 40 columns wide, but lines must not be wrapped
    show_error(console, error)
    assert written(console) == f"error: {error.message}\nhint:  {error.hint}\n"
    console = terminal()
    show_error(console, error)
    assert "\x1b[1;31merror:" in written(console)


def test_an_error_of_several_settings_lists_all_without_an_empty_hint():
    console = pipe()
    show_error(console, SettingsError([("--ways is 1", "use 2"), ("--shots is 0", "use 1")]))
    assert written(console) == "error: 2 settings are wrong\n  --ways is 1 (use 2)\n  --shots is 0 (use 1)\n"


TRAINED = TrainResult(
    "runs/a b", "finished", "", 500, 500, "accuracy", 0.9312, 0.0061, 7, 600, "transductive", 482.0
)


def test_a_training_ends_with_the_commands_to_run_next():
    console = pipe()
    show_train_result(console, TRAINED)
    assert written(console).splitlines() == [
        "finished  runs/a b",
        "steps  500 of 500 meta-steps in 8:02",
        "best   93.12 ± 0.61 % after epoch 7 (600 validation tasks, transductive)",
        "test   mamlctl eval 'runs/a b'",
    ]
    console = pipe()
    none = replace(TRAINED, best_val_score=None, best_val_ci95=None, best_epoch=None)
    show_train_result(console, replace(none, status="interrupted", reason="SIGINT", step=3))
    assert "interrupted (SIGINT)" in written(console)
    assert "no validation yet" in written(console)
    assert "mamlctl train --resume 'runs/a b'" in written(console)


@pytest.mark.parametrize(("score", "warned"), [(0.205, True), (0.195, True), (0.2062, False), (None, False)])
def test_a_training_that_ends_at_chance_says_so(score: float | None, warned: bool):
    console = pipe()
    show_train_result(console, replace(TRAINED, chance=0.2, best_val_score=score))
    assert ("chance 20.00 %: the interval includes it" in written(console)) == warned
    for other in ({"chance": None}, {"status": "interrupted", "reason": "SIGINT"}):
        console = pipe()
        show_train_result(console, replace(TRAINED, **{"chance": 0.2, "best_val_score": score, **other}))
        assert "chance" not in written(console)


def an_evaluation(inner_steps: int = 5, ci95: float = 0.0025) -> EvalResult:
    per_step = tuple(0.05 + 0.9 * k / inner_steps for k in range(inner_steps + 1))
    facts = ("best", "best", "accuracy", 0.9731, ci95, 600, "test", 20, 1, 15, inner_steps, "transductive")
    best = EvalRow(
        *facts,
        epochs=(93,),
        per_step=per_step,
        per_step_ci95=(0.01,) * (inner_steps + 1),
        per_step_tasks=600,
    )
    rows = (best, replace(best, model="ensemble-5", kind="ensemble", score=0.978, epochs=(93, 91)))
    return EvalResult("runs/a", "omniglot", "maml++", "runs/a/eval/test-0123", 12.3, rows)


def test_an_evaluation_is_an_aligned_table_of_plain_text_in_a_pipe():
    console = pipe()
    show_eval_result(console, an_evaluation())
    lines = written(console).splitlines()
    rows = [line for line in lines if line.startswith(("model", "best ", "ensemble-5 "))]
    assert rows[1].split("  ")[0] == "best"
    assert rows[1].endswith("97.31 ± 0.25 %    600   test  transductive            5")
    assert "97.80 ± 0.25 %" in rows[2]
    assert len({len(row) for row in rows[:3]}) == 1
    assert rows[4].split() == ["best", "5.00", "23.00", "41.00", "59.00", "77.00", "95.00"]
    assert "chance: 5.00 %" in lines[-1]
    assert "runs/a/eval/test-0123" in lines[-1]
    assert "\x1b" not in written(console)


def test_an_ensemble_of_one_has_no_row_beside_the_best_model():
    best, ensemble = an_evaluation().rows
    alone = replace(ensemble, model="ensemble-1", epochs=best.epochs)
    for rows, expected in (((best, alone), "best"), ((alone,), "ensemble-1")):
        show_eval_result(console := pipe(), replace(an_evaluation(), rows=rows))
        starts = [line.split()[0] for line in written(console).splitlines() if "transductive" in line]
        assert starts == [expected]


def test_scores_per_step_name_their_tasks_and_may_be_absent():
    evaluation = an_evaluation()
    some, none, single = (
        replace(
            evaluation,
            rows=tuple(replace(row, per_step=steps, per_step_tasks=tasks) for row in evaluation.rows),
        )
        for steps, tasks in ((evaluation.rows[0].per_step, 100), ((), 0), ((0.5,), 600))
    )
    texts = []
    for each in (evaluation, some, none, single):
        show_eval_result(console := pipe(), each)
        texts.append(written(console))
    assert "accuracy in % after each inner step\n" in texts[0]
    assert "accuracy in % after each inner step, first 100 tasks\n" in texts[1]
    for text in texts[2:]:
        assert "after each inner step" not in text and "\n\n\n" not in text
    assert texts[2].splitlines()[-1] == texts[0].splitlines()[-1]


def test_an_evaluation_of_many_steps_is_not_wrapped_by_a_terminal():
    console = terminal(80)
    show_eval_result(console, an_evaluation(20, math.inf))
    text = re.sub(r"\x1b\[[0-9;]*m", "", written(console))
    assert "97.31 ± ? %" in text
    tables = text.split("accuracy in %")[1].split("epoch")[0].splitlines()
    assert max(map(len, tables)) <= 80
    assert " ".join(tables).count("best ") == 3  # 8, 8 and 5 steps


def test_json_is_one_line_with_null_for_numbers_that_are_not_finite():
    stream = StringIO()
    write_json(stream, {"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf, "d": True}, "e": "ä" * 500})
    assert stream.getvalue().count("\n") == 1
    assert json.loads(stream.getvalue()) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None, "d": True},
        "e": "ä" * 500,
    }

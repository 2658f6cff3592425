"""Events and frames, shared by the tests of the display."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

from rich.console import Console

from mamlctl.core.events import Event, RunStarted, TrainReport, ValidationDone
from mamlctl.display.live_state import LiveState, advance
from mamlctl.display.training_view import render

RUN = RunStarted(
    run="runs/omniglot-20w1s-maml++-s0",
    dataset="omniglot",
    algo="maml++",
    improvements=("msl", "da", "bnrs", "bnwb", "lslr", "ca"),
    ways=20,
    shots=1,
    queries=15,
    meta_batch_size=8,
    inner_steps=5,
    inner_lr=0.1,
    epochs=10,
    steps_per_epoch=50,
    first_step=0,
    parameters=112084,
    metric="accuracy",
    guesses=20,
    device="cpu (x86_64, 2 threads)",
    bn="transductive",
    val_tasks=600,
    body_epochs=0,
)
LAYERS = ("conv1.weight", "conv2.weight", "conv3.weight", "conv4.weight", "linear.weight", "linear.bias")
VALIDATION = ValidationDone(
    step=50,
    epoch=1,
    metric="accuracy",
    val_score=0.9312,
    val_ci95=0.0061,
    val_tasks=600,
    bn="transductive",
    best_val_score=0.9312,
    best_val_ci95=0.0061,
    best_epoch=1,
)


def a_report(step: int = 30, inner_steps: int = 5, **changes: object) -> TrainReport:
    report = TrainReport(
        step=step,
        epoch=0,
        support_loss=0.812,
        query_losses=tuple(3.0 / (1 + k) for k in range(inner_steps + 1)),
        query_accuracies=tuple(0.05 + 0.9 * k / inner_steps for k in range(inner_steps + 1)),
        query_accuracy=0.95,
        meta_loss=0.523,
        msl_weights=(0.0,) * (inner_steps - 1) + (1.0,),
        meta_lr=0.001,
        first_order=True,
        tasks_per_second=38.1,
        memory_bytes=3 * 2**29,
        rates={name: tuple(0.1 + 0.01 * k for k in range(inner_steps)) for name in LAYERS},
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def state_after(*events: Event) -> LiveState:
    state = LiveState(0.0)
    for second, event in enumerate(events, start=1):
        state = advance(state, event, float(second))
    return state


def frame(state: LiveState, width: int, height: int) -> list[str]:
    console = Console(file=StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(render(state, width, height))
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()

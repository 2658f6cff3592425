"""The command line of the benchmark."""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.cases import (
    CASES,
    CPU_ENGINES,
    CUDA_ENGINES,
    ENGINES,
    GROWTH,
    PEER_CASES,
    PEERS,
    Case,
    engine_problem,
    engine_settings,
    growth_cases,
    in_both_orders,
)
from benchmarks.curves import CurveRow, curves_table, measure_curves
from benchmarks.report import document, growth_table, main_table, matrix_rates, peers_table
from benchmarks.rounds import Machine, Plan, Row, measure
from benchmarks.scaling import ScalingRow, measure_scaling, scaling_table
from mamlctl import __version__

Work = tuple[str, Case, list[str]]  # part, case, learners
QUICK_ONLY, QUICK_REPEATS, QUICK_SECONDS = "5w1s", 3, 5.0
GROWTH_REPEATS = 3


def main_work(only: str, engines: Sequence[str], peers: Sequence[str]) -> list[Work]:
    """List every case in both orders; the cases in `PEER_CASES` also run the peers in second order."""
    work = []
    for case in (ordered for base in CASES if only in base.name for ordered in in_both_orders(base)):
        others = peers if case.name in PEER_CASES and not case.first_order else ()
        work.append(("main", case, [*engines, *others]))
    return work


def growth_work(engines: Sequence[str]) -> list[Work]:
    """List the cases in which one number grows, in second order."""
    return [(axis, case, list(engines)) for axis in GROWTH for case in growth_cases(axis)]


def carry_out(work: Sequence[Work], plan: Plan, machine: Machine, log: Console) -> list[Row]:
    """Measure all cases and print one line on stderr after each; return the rows."""
    rows: list[Row] = []
    for number, (part, case, learners) in enumerate(work, 1):
        found = measure(part, case, learners, plan, machine)
        rows += found
        done = ", ".join(
            f"{row.learner} {'skipped' if row.skipped else f'{statistics.median(row.seconds):.3g} s'}"
            for row in found
        )
        grown = "" if part == "main" else f" {part} {getattr(case, part)}"
        log.print(f"{number}/{len(work)} {case.name}{grown} {case.order} order: {done}", highlight=False)
    return rows


def stdout_console() -> Console:
    """A console on stdout; a pipe has no width, so rich would assume 80 columns and cut the tables."""
    return Console(width=None if sys.stdout.isatty() else 160)


def show(rows: Sequence[Row], rates: dict[str, float], machine: Machine) -> None:
    """Print all tables on stdout."""
    console = stdout_console()
    facts = machine.facts
    where = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
    size = facts["matrix_size"]
    speeds = ", ".join(
        f"{precision} {rate:.4g} GFLOP/s (n = {len(machine.seconds[precision])})"
        for precision, rate in rates.items()
    )
    console.print(
        f"{where}; torch {facts['torch']}; matrix products {size}x{size}: {speeds}", highlight=False
    )
    if any(row.part == "main" for row in rows):
        console.print(main_table(rows, rates))
    if peers := peers_table(rows, rates):
        console.print(peers)
    for axis in GROWTH:
        if any(row.part == axis for row in rows):
            console.print(growth_table(axis, rows))


def show_estimates(log: Console) -> None:
    """Print the estimates for GPUs, which need Triton."""
    try:
        from benchmarks.roofline import estimates
    except ImportError:
        log.print("no estimates for GPUs: torch came without Triton", highlight=False)
    else:
        stdout_console().print(estimates())


def save(
    path: Path,
    rows: Sequence[Row],
    rates: dict[str, float],
    machine: Machine,
    plan: Plan,
    on_curves: Sequence[CurveRow] = (),
    of_ranks: Sequence[ScalingRow] = (),
) -> None:
    """Write the whole run as a single JSON document; arguments are what was measured, and how."""
    products = {
        precision: {"gflop_per_second": rate, "seconds": machine.seconds[precision]}
        for precision, rate in rates.items()
    }
    head: dict[str, Any] = {
        "mamlctl": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "curves": [asdict(row) for row in on_curves],
        "ranks": [asdict(row) for row in of_ranks],
        "settings": asdict(plan) | {"official": str(plan.official) if plan.official else None},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(rows, machine.facts, products, **head), indent=1) + "\n")


def bench(
    only: Annotated[str, typer.Option(help="Only run cases whose name contains this text.")] = "",
    engines: Annotated[
        str, typer.Option(help="Comma-separated engines, e.g. plain,adjoint,adjoint-bf16.")
    ] = "",
    peers: Annotated[bool, typer.Option(help="Also time higher, torchopt and torch.func.")] = True,
    growth: Annotated[bool, typer.Option(help="Vary inner steps, tasks, ways and shots instead.")] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Measurements per learner; tables show their median.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Time limit per case, after 3 repeats.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    official: Annotated[
        Path | None, typer.Option(help="A checkout of HowToTrainYourMAMLPytorch to time as well.")
    ] = None,
    curves: Annotated[bool, typer.Option(help="Also time training on curves, and JAX.")] = True,
    scaling: Annotated[bool, typer.Option(help="Also time one and two processes that share tasks.")] = True,
    estimate: Annotated[bool, typer.Option(help="Also estimate meta-steps on GPUs.")] = True,
    quick: Annotated[bool, typer.Option(help="Only run the smallest cases, with 3 repeats.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json.")] = Path("runs/bench"),
) -> None:
    """Time meta-steps of every engine and of other MAML implementations."""
    if quick:
        only, repeats, seconds = (
            only or QUICK_ONLY,
            repeats or QUICK_REPEATS,
            seconds or QUICK_SECONDS,
        )
    if growth:
        repeats = repeats or GROWTH_REPEATS
    names = engines.split(",") if engines else _engines(device, growth)
    plan = Plan(
        device, repeats or Plan.repeats, seconds or Plan.seconds, official.resolve() if official else None
    )
    log = Console(stderr=True, soft_wrap=True)
    machine = Machine(device)
    known = []
    for name in names:
        problem = engine_problem(name)
        if not problem:
            known.append(name)
            problem = machine.problem(engine_settings(name)["precision"])  # which is also in its rows
        if problem:
            log.print(f"skipped {name}: {problem}", highlight=False)
    others = [*(PEERS if peers else ()), *(["official"] if official else [])]
    work = growth_work(known) if growth else main_work(only, known, others)
    rows = carry_out(work, plan, machine, log)
    rates = matrix_rates(machine.seconds, machine.flops)
    show(rows, rates, machine)
    on_curves = measure_curves(plan.repeats) if curves and device == "cpu" and not growth else []
    if on_curves:
        stdout_console().print(curves_table(on_curves))
    of_ranks = measure_scaling(plan.repeats) if scaling and device == "cpu" and not growth else []
    if of_ranks:
        stdout_console().print(scaling_table(of_ranks))
    save(out / "bench.json", rows, rates, machine, plan, on_curves, of_ranks)
    if estimate:
        show_estimates(log)
    log.print(f"wrote {out / 'bench.json'}", highlight=False)
    machine.close()


def _engines(device: str, growth: bool) -> Sequence[str]:
    if growth:
        return ENGINES
    return CPU_ENGINES if device == "cpu" else CUDA_ENGINES


if __name__ == "__main__":
    typer.run(bench)

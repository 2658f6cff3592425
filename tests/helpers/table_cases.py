"""Tables with invented numbers, shared by the tests of reports."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from mamlctl.core.results import EvalRow
from mamlctl.core.statistics import Difference
from mamlctl.report.published import published
from mamlctl.report.rendered_table import render_table
from mamlctl.report.table import Cell, Row, Score, Table

ONE_ON = ("maml", *(f"maml + {part}" for part in ("msl", "da", "bnrs", "bnwb", "bnrs + bnwb", "lslr", "ca")))
# The best model of the demo, as `eval` returns it.
EVAL_ROW = EvalRow(
    model="best",
    kind="best",
    metric="accuracy",
    score=0.8927,
    ci95=0.0111,
    tasks=300,
    split="test",
    ways=5,
    shots=1,
    queries=3,
    inner_steps=5,
    bn="transductive",
    epochs=(4,),
    per_step=(),
    per_step_ci95=(),
    per_step_tasks=0,
)
LETTERS = ("msl", "da", "bnrs", "bnwb", "lslr", "ca")
HOSTILE = '<b>&_%$#~^{}\\ | "x" --lr'
TENSORS = [f"conv{n}.{kind}" for n in (1, 2, 3, 4) for kind in ("weight", "bias")]
TENSORS += ["linear.weight", "linear.bias"]


def difference(mean, p, *, seeds=3, width=0.008):
    """A difference with intervals that contain its mean."""
    return Difference(
        mean=mean,
        low=mean - width,
        high=mean + width,
        p=p,
        df=2.0,
        seeds=seeds,
        tasks=600,
        tasks_low=mean - width / 3,
        tasks_high=mean + width / 3,
        tasks_p=p / 7,
        permutation_p=p / 6,
        bootstrap_low=mean - 0.9 * width,
        bootstrap_high=mean + 1.1 * width,
    )


def score(rng, mean, *, seeds=3, inner_steps=5, gain=None, p=0.2, metric="accuracy"):
    """A score around `mean`; with a gain, it has a difference from the baseline."""
    per_seed = tuple(float(x) for x in mean + rng.normal(0, 0.004, seeds))
    start = 0.2 if metric == "accuracy" else 3.2
    share = 1 - 0.1 ** np.arange(inner_steps + 1)
    return Score(
        mean=float(np.mean(per_seed)),
        ci95=float(rng.uniform(0.002, 0.008)),
        deviation=float(np.std(per_seed, ddof=1)) if seeds > 1 else None,
        per_seed=per_seed,
        per_step=tuple(float(x) for x in start + (mean - start) * share),
        per_step_tasks=100,
        difference=None if gain is None else difference(gain, p, seeds=seeds),
        p_holm=None if gain is None else min(8 * p, 1.0),
    )


def cell(rng, label, seed, *, mean=0.93, steps=300, learns_rates=False, metric="accuracy"):
    """A finished run."""
    taken = np.arange(25, steps + 1, 25)
    start = 0.4 if metric == "accuracy" else 3.0
    late = rng.normal(60, 15)
    curve = mean + (start - mean) * np.exp(-taken / late) + rng.normal(0, 0.006, len(taken))
    rates = {name: tuple(map(float, rng.normal(0.4, 0.15, 5))) for name in TENSORS} if learns_rates else {}
    folder = label.replace(" + ", "-")
    return Cell(
        seed=seed,
        run=f"cells/{folder}-s{seed}",
        status="finished",
        reason="",
        steps=steps,
        steps_to_99=int(taken[-4]),
        step_s=float(rng.uniform(0.2, 0.4)),
        validation=tuple((int(step), float(value)) for step, value in zip(taken, curve, strict=True)),
        rates=rates,
        command=f"mamlctl train --dataset omniglot --ways 20 --seed {seed} --out cells/{folder}-s{seed}",
        device="cpu (x86_64, 2 threads)",
    )


def unfinished(ended, status, *, steps=120, reason="", diverged_at=None):
    """The run as if it had failed, diverged, or not started."""
    return replace(
        ended,
        status=status,
        reason=reason,
        diverged_at=diverged_at,
        steps=steps,
        steps_to_99=None,
        step_s=None,
        validation=ended.validation[: steps // 25],
        rates={},
    )


def row(
    rng, label, place, *, seeds=3, mean=None, dataset="omniglot", ways=20, metric="accuracy", scored=True
):
    """A row; the one at place 0 is the baseline."""
    mean = 0.9 + 0.008 * place if mean is None else mean
    learns = "lslr" in label.split(" + ") or label == "maml++"
    cells = [cell(rng, label, seed, mean=mean, learns_rates=learns, metric=metric) for seed in range(seeds)]
    gain, p = (None, 1.0) if place == 0 else (mean - 0.9, 0.03 / place**2)
    how = {"seeds": seeds, "metric": metric, "gain": gain, "p": p}
    return Row(
        label=label,
        settings={"algo": label.split(" + ")[0], "first_order": place == 2}
        | dict.fromkeys(label.split(" + ")[1:], True),
        cells=tuple(cells),
        best=score(rng, mean, **how) if scored else None,
        ensemble=score(rng, mean + 0.004, **how) if scored else None,
        ensemble_size=5,
        published=published(dataset, ways, 1 if metric == "accuracy" else 5, *learner(label)),
        bn="transductive",
        inner_steps=5,
        added=tuple(label.split(" + ")[1:]),
    )


def table(rows, **changes):
    """A table of these rows; the first is the baseline."""
    return Table(
        **{
            "title": "omniglot 20-way 1-shot, one-on",
            "dataset": "omniglot",
            "ways": 20,
            "shots": 1,
            "queries": 1,
            "metric": "accuracy",
            "split": "test",
            "tasks": 600,
            "eval_seed": 0,
            "disjoint": False,
            "label_permutations": 1,
            "baseline": rows[0].label,
            "rows": tuple(rows),
            "settings": {
                "dataset": "omniglot",
                "ways": 20,
                "shots": 1,
                "inner_steps": 5,
                "inner_lr": 0.4,
                "meta_lr": 0.001,
            },
            "environment": {
                "python": "3.11.7",
                "torch": "2.11.0",
                "device": "cpu (x86_64, 2 threads)",
                "git": {"commit": "85eb56b"},
            },
            "commands": ("mamlctl ablate --dataset omniglot --ways 20 --shots 1 --plan one-on --seeds 3",),
            "notes": ("The differences of 9 rows from one baseline are not independent of each other.",),
        }
        | changes
    )


def one_on():
    """9 rows x 3 seeds: one row has diverged, one run is missing and one has failed."""
    rng = np.random.default_rng(6)
    rows = [row(rng, label, place) for place, label in enumerate((*ONE_ON, "maml++"))]
    why = {"reason": "the query loss is nan", "diverged_at": 121}
    rows[4] = replace(
        rows[4],
        cells=tuple(unfinished(ended, "diverged", **why) for ended in rows[4].cells),
        best=None,
        ensemble=None,
        ensemble_size=0,
    )
    first, second, third = rows[2].cells
    cells = (first, second, unfinished(third, "missing", steps=0))
    rows[2] = replace(rows[2], cells=cells, best=replace(rows[2].best, per_seed=rows[2].best.per_seed[:2]))
    first, *others = rows[7].cells
    failed = unfinished(first, "failed", steps=75, reason="out of memory")
    rows[7] = replace(rows[7], cells=(failed, *others))
    return table(rows)


def curves():
    """Regression, with mean squared errors, one seed and no ensemble."""
    rng = np.random.default_rng(1)
    labels = ("maml", "transfer")
    rows = [
        row(rng, label, place, seeds=1, mean=mean, dataset="sinusoid", ways=1, metric="mse")
        for place, (label, mean) in enumerate(zip(labels, (0.34, 2.42), strict=True))
    ]
    rows = [replace(each, ensemble=None, ensemble_size=0) for each in rows]
    best = replace(rows[1].best, difference=difference(2.08, 1e-9, seeds=1, width=0.2), p_holm=1e-9)
    rows[1] = replace(rows[1], best=best)
    given = {"dataset": "sinusoid", "ways": 1, "shots": 5, "queries": 100, "metric": "mse"}
    return table(rows, title="sinusoid 5-shot, compared", **given)


def full():
    """All 64 combinations of the six improvements, with one seed."""
    rng = np.random.default_rng(64)
    rows = []
    for place in range(64):
        on = [name for bit, name in enumerate(LETTERS) if place >> bit & 1]
        rows.append(row(rng, " + ".join(["maml", *on]), place, seeds=1, mean=0.9 + 0.001 * place))
    return table(rows, title="omniglot 20-way 1-shot, full")


def hostile():
    """Names with a meaning in HTML, LaTeX, Markdown or CSV, and numbers that JSON cannot represent."""
    rng = np.random.default_rng(2)
    rows = [
        row(rng, "maml", 0, seeds=1),
        row(rng, HOSTILE, 1, seeds=1),
        row(rng, "=1+1,\n\x1b[31mred 日本 é", 2),
    ]
    endless = replace(rows[1].best.difference, low=-math.inf, high=math.inf, p=math.nan, tasks_p=math.nan)
    rows[1] = replace(rows[1], best=replace(rows[1].best, ci95=math.inf, difference=endless, p_holm=math.nan))
    return table(
        rows,
        title=HOSTILE,
        settings={HOSTILE: HOSTILE, "none": None},
        environment={"gpu": ["<script>alert(1)</script>"]},
        notes=("</style><script src=http://evil.example/x.js></script>",),
        commands=("mamlctl ablate --out '<a & b>'",),
    )


def empty():
    """A table before the first run."""
    given = one_on()
    rows = [
        replace(
            each,
            cells=tuple(unfinished(ended, "missing", steps=0) for ended in each.cells),
            best=None,
            ensemble=None,
            ensemble_size=0,
        )
        for each in given.rows
    ]
    return table(rows)


def learner(label):
    """The algorithm and the improvements of a label."""
    algo, *removed = label.split(" - ")
    if algo == "maml++":
        return "maml", [name for name in LETTERS if name not in removed]
    algo, *added = label.split(" + ")
    return algo, added


def text_rows(table, sort=None):
    """The heads, then each row's texts."""
    return render_table(table, sort).lines()


TABLES = {"one-on": one_on, "mse": curves, "64 rows": full, "hostile": hostile, "empty": empty}

"""The tables of the documentation that are made from receipts, with the published numbers beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mamlctl.core import formatting
from mamlctl.core.statistics import over_seeds
from mamlctl.data.rules import metric_of
from mamlctl.data.sets.registry import has_rewards
from mamlctl.experiments.settings import fill_defaults
from mamlctl.report.column_texts import FROM_MEMORY, RECALLED, letter
from mamlctl.report.table import Published
from records.experiments import FAST_5, FAST_20, FOLDER, MINI_IMAGENET, Experiment, experiments
from records.receipts import FOLDER as RECEIPTS
from records.receipts import Receipt, receipt_file, valid_receipt

NOT_RUN = "not run"
IN_README = (FAST_5, FAST_20, MINI_IMAGENET, "sinusoid-5s-maml")
SHARES = (0.1, 0.25, 0.5, 0.75, 1)  # of the validation curve
WIDTH = 100  # characters of a line of prose

TableOf = Callable[[Sequence[str], Sequence[Sequence[str]]], str]  # heads and rows -> Markdown


@dataclass(frozen=True)
class Line:
    """A line of the table of results: an experiment after a number of inner steps."""

    experiment: Experiment
    receipts: Sequence[Receipt]
    inner_steps: int | None  # None: the last one
    published: Sequence[Published]

    @property
    def steps(self) -> int:
        """The number of inner steps in the test."""
        last = self.experiment.test.inner_steps
        last = self.experiment.config.evaluation_inner_steps if last is None else last
        return last if self.inner_steps is None else self.inner_steps

    def meta_steps(self) -> str:
        """The meta-steps done, and the time if that is what ends the training."""
        minutes = self.experiment.minutes
        limit = "" if minutes is None else f"{minutes:g} min"
        if not self.receipts:
            return limit or f"{self.experiment.config.total_steps:,}"
        done = round(over_seeds([receipt["training"]["meta_steps"] for receipt in self.receipts])[0])
        return f"{done:,}{limit and f' in {limit}'}"

    def score(self, kind: str, mode: str | None = None) -> str:
        """The score of the best checkpoint or of the ensemble.

        Args:
            kind: "best" or "ensemble".
            mode: the batch-norm mode; None for the first one of the experiment.
        """
        mode = mode or self.experiment.modes[0] or "none"
        results = self._results(kind, mode)
        if not results:
            return NOT_RUN
        metric = metric_of(self.experiment.config)
        if len(results) == 1:
            mean, half = self._after_steps(metric, results[0])
        else:
            mean, half = over_seeds([self._after_steps(metric, result)[0] for result in results])
        note = f" ({self.seeds()} seeds)" if len(self.experiment.seeds) > 1 else ""
        return formatting.score(metric, mean, half) + note

    def seeds(self) -> str:
        """The number of seeds, or how many of them have a receipt: "3" or "2 of 3"."""
        seeds, done = len(self.experiment.seeds), len(self.receipts)
        return f"{done} of {seeds}" if done < seeds else f"{seeds}"

    def returns(self) -> list[str]:
        """The mean return of the best model over the seeds, after 0, 1, ... inner steps.

        The half widths are the means of those of the seeds' 95 % intervals over tasks. That of the mean
        return is at most as large, since the deviation of a mean is at most the mean deviation.
        """
        results = self._results("best", "none")
        means, halves = (
            [fmean(numbers) for numbers in zip(*(result[key] for result in results), strict=True)]
            for key in ("per_step", "per_step_ci95")
        )
        return [f"{mean:.2f} ± {half:.2f}" for mean, half in zip(means, halves, strict=True)] or [NOT_RUN]

    def _results(self, kind: str, mode: str) -> list[Mapping[str, Any]]:
        """The results of a kind of model in a batch-norm mode, one for each receipt."""
        return [
            result
            for receipt in self.receipts
            for test in receipt["tests"]
            for result in test["results"]
            if (result["kind"], result["bn"]) == (kind, mode)
        ]

    def _after_steps(self, metric: str, result: Mapping[str, Any]) -> tuple[float, float]:
        """The score after the inner steps of this line, and the half width of its interval over tasks."""
        if self.steps == result["inner_steps"]:
            return result[metric], result["ci95"]
        return result["per_step"][self.steps], result["per_step_ci95"][self.steps]


def lines(files: Path = FOLDER, folder: Path = RECEIPTS) -> list[Line]:
    """A line for every experiment and every number of inner steps that has a published result.

    `files` is the folder of the experiments, and `folder` that of the receipts.
    """
    found = []
    for experiment in experiments(files, device="cuda"):
        documents = [valid_receipt(experiment, seed, folder) for seed in experiment.seeds]
        kept = [document for document in documents if document]
        by_steps: dict[int | None, list[Published]] = {}
        for published, inner_steps in experiment.published:
            by_steps.setdefault(inner_steps, []).append(published)
        found += [Line(experiment, kept, *group) for group in by_steps.items() or [(None, [])]]
    return found


def _number(published: Published) -> str:
    """A published number with its provenance mark."""
    text = f"{published.score:g}"  # errors have no ±
    if published.metric == "accuracy":
        text = formatting.interval(published.score, published.half_width)
    return text if published.verified else f"{text} {RECALLED}"


def results(table: TableOf, found: Sequence[Line]) -> str:
    """All results except those of policies, then a footnote for every published number."""
    notes: dict[str, str] = {}  # the text of each footnote -> its letter
    rows = []
    for line in (line for line in found if not has_rewards(line.experiment.config)):
        cells = []
        for published in line.published:
            remark = f"; {published.note}" if published.note else ""
            seen = "" if published.verified else f"; {FROM_MEMORY}"
            note = f"{published.source}, row '{published.row}'{remark}{seen}."
            cells.append(f"{_number(published)} ({notes.setdefault(note, letter(len(notes)))})")
        name, scores = f"`{line.experiment.name}`", (line.score("best"), line.score("ensemble"))
        rows.append([name, line.meta_steps(), str(line.steps), *scores, ", ".join(cells) or "-"])
    heads = ("experiment", "meta-steps", "inner steps", "best model", "ensemble", "published")
    footnotes = [
        textwrap.fill(f"- {mark}: {note}", WIDTH, subsequent_indent="  ") for note, mark in notes.items()
    ]
    return "\n".join([table(heads, rows), *footnotes, ""])


def modes(table: TableOf, found: Sequence[Line]) -> str:
    """The best model of every experiment on images, in each batch-norm mode."""
    images = [line for line in found if line.experiment.modes != (None,)]
    names = [str(mode) for mode in images[0].experiment.modes]
    rows = [[f"`{line.experiment.name}`", *(line.score("best", mode) for mode in names)] for line in images]
    return table(("experiment", *names), rows)


def returns(table: TableOf, found: Sequence[Line]) -> str:
    """The mean return of every policy after each inner step of its test."""
    policies = [line for line in found if has_rewards(line.experiment.config)]
    most = max(line.steps for line in policies)
    rows = []
    for line in policies:
        config, cells = line.experiment.config, line.returns()
        name, outer = f"`{line.experiment.name}`", f"`{config.outer}`" if config.outer else "-"
        rows.append([name, outer, line.meta_steps(), line.seeds(), *cells, *["-"] * (most + 1 - len(cells))])
    steps = [f"{step} {formatting.plural(step, 'step')}" for step in range(1, most + 1)]
    return table(("experiment", "outer step", "meta-steps", "seeds", "before", *steps), rows)


def curves(table: TableOf, found: Sequence[Line]) -> str:
    """The validation score at some points of training, with the number of meta-steps.

    Runs with fewer validations are left out.
    """
    rows = []
    for name, receipt in _named(found):
        metric, curve = receipt["validation"].get("metric"), receipt["validation"]["curve"]
        if len(curve) < len(SHARES):
            continue
        points = [curve[max(round(share * len(curve)), 1) - 1] for share in SHARES]
        rows.append(
            [name, *(f"{formatting.score(metric, score, ci95)} at {step:,}" for step, score, ci95 in points)]
        )
    return table(("run", *(f"{100 * share:g} %" for share in SHARES)), rows)


def runs(table: TableOf, found: Sequence[Line]) -> str:
    """The commit, the machine and the time of every receipt."""
    rows = []
    for name, receipt in _named(found):
        training = receipt["training"]
        commits = [
            f"{commit['commit'][:7]}{' (changed)' if commit['dirty'] else ''}" if commit else "unknown"
            for commit in receipt["commits"]
        ]
        machines = [
            f"{place['cpu']}, {place['instructions']}, {place['device']}" for place in receipt["environments"]
        ]
        times = [formatting.clock(training[key]) for key in ("wall_s", "processor_s")]
        link = f"[{name}](../records/{name}.json)"
        rows.append([link, ", ".join(commits), "; ".join(machines), *times, str(training["slices"])])
    heads = ("receipt", "commit", "machine", "training time", "processor time", "slices")
    return table(heads, rows)


def _named(found: Sequence[Line]) -> list[tuple[str, Receipt]]:
    """Every receipt once, with its name."""
    named = {
        receipt_file(line.experiment, receipt["seed"], RECEIPTS).stem: receipt
        for line in found
        for receipt in line.receipts
    }
    return list(named.items())


def headline(table: TableOf, found: Sequence[Line]) -> str:
    """The short table of the README: each experiment after its most inner steps."""
    last = {line.experiment.name: line for line in sorted(found, key=lambda line: line.steps)}
    rows = []
    for line in (last[name] for name in IN_README):
        config = fill_defaults(line.experiment.config)
        task = formatting.task(config.dataset, config.ways, config.shots)
        published = _number(line.published[0]) if line.published else "-"
        steps = f", {line.steps} inner {formatting.plural(line.steps, 'step')}" if line.inner_steps else ""
        fast = ", fast preset" if line.experiment.name in (FAST_5, FAST_20) else ""
        name = f"{task}, `{config.algo}`{steps}{fast}"
        rows.append([name, line.meta_steps(), line.score("best"), published])
    return table(("experiment", "meta-steps", "ours", "published"), rows)

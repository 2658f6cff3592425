"""The `eval` command, for test tasks and for the user's own images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mamlctl.cli.common_options import (
    GuardOptions,
    Nproc,
    RankTimeout,
    begin_work,
    option,
    share_of_process,
    started_models,
    together,
    unused,
)
from mamlctl.cli.options import with_options
from mamlctl.core.errors import STOP_EXIT_CODES, ExitCode, SettingsError
from mamlctl.core.literals import StopReason
from mamlctl.core.problems import Problem, flag
from mamlctl.core.process import check_single
from mamlctl.core.results import named
from mamlctl.data.rules import per_step_problems
from mamlctl.data.sets.registry import has_rewards, is_table
from mamlctl.display import predictions
from mamlctl.display.run_results import show_eval_result
from mamlctl.experiments.export.target import export_problems
from mamlctl.experiments.runs.search import hint_for_missing_run
from mamlctl.report.guard import Limit, check_evaluation
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.fields import EPISODE, OUTPUT, OWN_IMAGES
from mamlctl.settings.variables import variable_values
from mamlctl.shipped_models import local_run

# Settings of the tasks that a test draws; they have no effect on the user's own images.
TASK_SETTINGS = (
    "data_root",
    "models",
    "per_step",
    "per_step_tasks",
    *(item.name for item in fields(EvalConfig) if item.metadata["panel"] == EPISODE),
)


@dataclass(frozen=True)
class EvaluateOptions(GuardOptions):
    """The options of `eval` other than the settings of the evaluation."""

    files: Annotated[
        list[Path] | None,
        typer.Argument(help="With --query: more query files, e.g. from a shell glob.", metavar="FILES"),
    ] = None
    support: Annotated[
        Path | None,
        option(
            OWN_IMAGES,
            "Folder with one subfolder of images for each of your classes; for a run on a table, the "
            "examples of a new task.",
            metavar="PATH",
        ),
    ] = None
    query: Annotated[
        list[Path] | None,
        option(
            OWN_IMAGES,
            "Image or folder to classify (repeatable); subfolders named after classes supply labels. For a "
            "run on a table, the inputs to predict, with or without targets.",
            metavar="PATH",
        ),
    ] = None
    csv: Annotated[
        Path | None, option(OWN_IMAGES, "Also write the predictions to a CSV file.", metavar="FILE")
    ] = None
    save_adapted: Annotated[
        Path | None,
        option(OWN_IMAGES, "Write the adapted weights to a file, for plain torch layers.", metavar="FILE"),
    ] = None
    export: Annotated[
        Path | None,
        option(
            OWN_IMAGES,
            "Export the adapted model to a new file: FILE.onnx for ONNX, FILE.pt2 for torch.export.",
            metavar="FILE",
        ),
    ] = None
    plot: Annotated[bool, option(OUTPUT, "Also draw figures in RUN/plots.", "--plot")] = False
    beside: Annotated[
        list[Path] | None,
        option(
            OUTPUT,
            "With --plot, for regression and policies: another run to draw next to this one (repeatable).",
        ),
    ] = None

    def problems(self, settings: Mapping[str, Any]) -> list[Problem]:
        """Problems for options and settings that have no effect, as (fact, hint) pairs."""
        limits = [
            name for name, value in self.by_flag("fail_under", "fail_over").items() if value is not None
        ]
        if settings.get("models") == "ensemble" and limits:
            fact = f"{limits[0]} judges the best model, which --models ensemble leaves out"
            return [(fact, "use --models best or all")]
        if self.support is None:
            image_options = self.by_flag("query", "csv", "save_adapted", "export")
            problems = unused(image_options, "without --support", "add --support DIR or leave it out")
            if self.files and not problems:
                problems.append(
                    (f"eval takes one run, but {self.files[0]} was given too", "evaluate one run at a time")
                )
            if self.beside and not self.plot:
                problems.append(("--beside has no effect without --plot", "add --plot or leave it out"))
            return problems
        of_tasks: dict[str, object] = {flag(name): True for name in TASK_SETTINGS if name in settings}
        of_tasks |= self.by_flag("fail_under", "fail_over")
        problems = unused(of_tasks, "with --support, since your own data are the only task")
        if self.beside:
            problems.append(("--beside is for test tasks, but --support is one task", "leave it out"))
        if not (self.query or self.files):
            hint = "add --query or leave it out"
            problems += unused(self.by_flag("csv", "plot"), "without --query", hint)
            if self.save_adapted is None and self.export is None:
                hint = "add --query, or --save-adapted FILE or --export FILE"
                problems.append(("--support has no effect alone", hint))
        if self.export is not None:
            problems += export_problems(self.export)
        return problems + self._repeated_files()

    def _repeated_files(self) -> list[Problem]:
        """Files that two options would write, as (fact, hint) pairs."""
        options: dict[Path, str] = {}
        problems = list[Problem]()
        for name, path in (("csv", self.csv), ("save_adapted", self.save_adapted), ("export", self.export)):
            if path is not None and (first := options.setdefault(path.resolve(), flag(name))) != flag(name):
                problems.append((f"{first} and {flag(name)} both write {path}", "name different files"))
        return problems


@with_options(EvaluateOptions, EvalConfig)
def evaluate(
    settings: dict[str, Any],
    options: EvaluateOptions,
    run: Annotated[
        Path | None,
        typer.Argument(
            help="Run folder, as printed by train, or a model that ships with mamlctl.",
            metavar="RUN",
            autocompletion=started_models,
        ),
    ] = None,
    nproc: Nproc = None,
    rank_timeout: RankTimeout = None,
) -> ExitCode:
    """The command `mamlctl eval`."""
    if run is None:
        raise SettingsError([("the argument 'run' is missing", hint_for_missing_run())])
    problems = _problems_of_policies(run, options) or options.problems(settings)
    if options.support is not None:
        check_single("mamlctl eval --support")
        of_ranks = {"--nproc": nproc, "--rank-timeout": rank_timeout}
        problems += unused(of_ranks, "with --support, since your own data are the only task")
    if problems:
        raise SettingsError(problems)
    if (code := share_of_process(nproc, rank_timeout, trust_code=options.trust_code)) is not None:
        return code
    config = EvalConfig(**{**variable_values(EvalConfig), **settings})
    run = local_run(run)
    options = replace(options, beside=[*map(local_run, options.beside or [])])
    trained = open_run(run)  # reports a missing or damaged run before torch is imported
    of_tasks = replace(config, per_step=config.per_step or options.plot)
    if problems := per_step_problems(of_tasks, trained.config):
        raise SettingsError(problems)
    limit = options.limit(replace(trained.config, dataset=config.dataset or trained.config.dataset))
    options.trust_code_of([run, *(options.beside or ())])
    support = options.support
    if support is None:
        return _test(run, of_tasks, limit, options, rank_timeout)
    if is_table(trained.config.dataset):
        _predict(run, support, config, options)
    else:
        _classify(run, support, config, options)
    return ExitCode.OK


def _problems_of_policies(run: Path, options: EvaluateOptions) -> list[Problem]:
    """The options for the user's own data if the run is a policy, as (fact, hint) pairs."""
    given = options.by_flag("support", "query", "csv", "save_adapted", "export")
    if not any(given.values()) or not run.is_dir() or not has_rewards(trained := open_run(run).config):
        return []
    why = f"with a run on {trained.dataset}: a policy learns from rewards, not from examples"
    return unused(given, why, "leave it out; eval tests the policy on new goals")


def _test(
    run: Path, config: EvalConfig, limit: Limit | None, options: EvaluateOptions, rank_timeout: str | None
) -> ExitCode:
    """Test the run on tasks of a data set; the exit code says whether drawing figures was stopped."""
    reason: StopReason = ""
    with options.display(f"testing {run} on {config.tasks} tasks") as display:
        with together(rank_timeout):
            from mamlctl.experiments.evaluate import evaluate_run  # imports torch

            begin_work()
            result = evaluate_run(run, config, offline=options.offline, on_event=display)
        if options.plot:
            from mamlctl.experiments.plot import draw

            beside = options.beside or []
            pictures, reason = draw(run, config, beside, offline=options.offline, on_event=display)
            result = replace(result, pictures=tuple(map(str, pictures)))
    document = {
        "format": 1,
        "run": result.run,
        "folder": result.folder,
        "results": [*map(named, result.rows)],
        "pictures": result.pictures,
        "notes": result.notes,
    }
    if result.table is not None:
        document["table"] = asdict(result.table)
    if result.loss is not None:
        document["loss"] = asdict(result.loss)
    options.write(result, document, show_eval_result)
    code = STOP_EXIT_CODES[reason]
    if limit is not None and code == ExitCode.OK:
        check_evaluation(result, open_run(run).state(), limit)
    return code


def _classify(run: Path, support: Path, config: EvalConfig, options: EvaluateOptions) -> None:
    """Classify the user's own images."""
    with options.display(f"adapting {run} to {support}") as display:
        from mamlctl.experiments.classify import ClassifyRequest, classify_images  # imports torch

        begin_work()
        queries = [*(options.query or []), *(options.files or [])]
        files = {"csv": options.csv, "save_adapted": options.save_adapted, "export": options.export}
        request = ClassifyRequest(support, queries, options.plot, **files)
        result = classify_images(run, config, request, on_event=display)
    options.write(result, predictions.document(result), predictions.show_classify_result)


def _predict(run: Path, support: Path, config: EvalConfig, options: EvaluateOptions) -> None:
    """Predict the rows of the user's own table."""
    queries = [*(options.query or []), *(options.files or [])]
    problems = unused(options.by_flag("save_adapted"), "for a run on a table")
    if len(queries) > 1 or not (queries or options.export):
        problems.append(
            (f"--query names {len(queries)} tables, but a run predicts one at a time", "name one")
        )
    if problems:
        raise SettingsError(problems)
    with options.display(f"adapting {run} to {support}") as display:
        from mamlctl.experiments.tables.predict import PredictionFiles, predict_table  # imports torch

        begin_work()
        query = queries[0] if queries else None
        files = PredictionFiles(support, query, options.csv, plot=options.plot, export=options.export)
        result = predict_table(run, config, files, on_event=display)
    options.write(result, predictions.table_document(result), predictions.show_table_prediction)

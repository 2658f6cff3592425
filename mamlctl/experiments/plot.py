"""The figures of a run: its training, its learnt rates, and curves or images before and after adaptation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.literals import StopReason
from mamlctl.core.metrics_rows import rows_of
from mamlctl.data.rules import metric_of
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.sets.registry import has_rewards, is_regression
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.data.tasks.episodes import Episodes, MiniBatches
from mamlctl.data.worlds import WORLDS
from mamlctl.engine.algorithms import policies
from mamlctl.engine.algorithms.algorithm import inner_rule
from mamlctl.engine.algorithms.policy_search import as_policy, walk
from mamlctl.engine.algorithms.registry import ALGORITHMS, algorithm_of
from mamlctl.engine.evaluation.prediction import adapted
from mamlctl.engine.training.initial_state import build
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.tables.plots import table_figure
from mamlctl.experiments.train import resume, train
from mamlctl.experiments.trained_model import TrainedModel, load_trained_model
from mamlctl.report.figures import path_figures, run_figures, training_figure
from mamlctl.report.figures.style import save
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

TASKS = 3  # per figure
PATHS = 2  # trajectories per task and number of inner steps
POINTS = 200  # of a drawn curve
STEPS = (0, 1, 5, 10)  # inner steps after which curves are drawn, as in the figure of the MAML paper

# Settings that a pre-trained start has in common with the run that it is compared with.
SHARED: tuple[str, ...] = ("dataset", "shots", "queries", "net", "head", "hidden", "activation", "inner_lr")
SHARED += ("meta_batch_size", "epochs", "steps_per_epoch", "val_tasks", "precision")
SHARED += ("seed", "init_seed", "train_seed", "eval_seed")


def draw(
    path: Path, settings: EvalConfig, beside: Sequence[Path], *, offline: bool, on_event: OnEvent
) -> tuple[list[Path], StopReason]:
    """Write the figures of a run into its folder plots/, each as PNG and SVG.

    Args:
        path: the run folder.
        settings: the settings of the evaluation, which define the tasks.
        beside: other runs whose curves are drawn; if empty, a run for comparison is pre-trained on all curves
            for the same number of meta-steps and kept in plots/.
        offline: never download.
        on_event: receives progress and notices.

    Returns:
        The files; if the pre-training was stopped, no files and the reason.

    Raises:
        SettingsError: `beside` is given for images, or its runs have other curves or no policies.
        MamlctlError: as `load_trained_model` and `train` do.
    """
    model = load_trained_model(path, settings, offline=offline, on_event=on_event)
    on_event(Waiting("drawing figures"))
    folder, name = path / "plots", f"{model.config.algo}, {path.name}"
    if has_rewards(model.config):
        opened = [load_trained_model(other, settings, offline=offline, on_event=on_event) for other in beside]
        for other in opened:
            if not has_rewards(other.config):
                fact = f"{other.run.path} was not trained on {model.config.dataset}"
                raise SettingsError([(fact, "use runs with policies")])
        world = WORLDS[model.config.dataset]
        figures = {"navigation": path_figures.paths(_path_rows([model, *opened]), world.half_side, name)}
    elif is_regression(model.config):
        others, curves = list(beside), model.config.dataset in FAMILIES
        if not others and curves and algorithm_of(model.config).start != "pre-trained":
            others = [folder / "pretrained"]
            if reason := _pretrain(model, others[0], offline, on_event):
                return [], reason
        opened = [load_trained_model(other, settings, offline=offline, on_event=on_event) for other in others]
        dataset = model.config.dataset
        for other in opened:
            if other.source.digest != model.source.digest:
                what = "curves" if curves else "tasks"
                fact = f"{other.run.path} has {what} of {other.config.dataset}, but this run of {dataset}"
                raise SettingsError([(fact, "use runs of the same data set")])
        if curves:
            figures = {"regression": run_figures.regression(_panels([model, *opened]), name)}
        else:
            figures = {"regression": table_figure([model, *opened], name)}
    elif beside:
        fact = "--beside is for regression and policies, but this run has images"
        raise SettingsError([(fact, "leave it out")])
    else:
        is_shown = len(model.source.example_shape) == 3 and model.source.example_shape[0] in (1, 3)
        figures = {"tasks": run_figures.tasks(_task_pictures(model), name)} if is_shown else {}
    metrics = model.run.metrics()
    if reports := rows_of(metrics, "report"):
        validations = rows_of(metrics, "validation")
        figures["training"] = training_figure.training(reports, validations, metric_of(model.config))
    state = model.states[0]
    if state.rates_learnt:
        rates = {tensor: rate.detach().double().cpu().numpy() for tensor, rate in state.rates.items()}
        figures["rates"] = run_figures.rates(rates, model.config.inner_lr, name)
    return [file for stem, figure in figures.items() for file in save(figure, folder / stem)], ""


def _pretrain(model: TrainedModel, path: Path, offline: bool, on_event: OnEvent) -> StopReason:
    """Pre-train or resume a run with as many meta-steps, unless it is finished; return why it was stopped."""
    if path.is_dir() and open_run(path).state().status == "finished":
        return ""
    on_event(Notice(f"pre-training on all curves at once, for the figure: {path}"))
    if path.is_dir():
        result = resume(path, {}, offline=offline, time_limit_s=None, command="", on_event=on_event)
    else:
        values = {name: getattr(model.run.config, name) for name in SHARED} | {"device": model.config.device}
        layer = {name: value for name, value in values.items() if value is not None}
        pretraining = (
            name
            for name, entry in ALGORITHMS.items()
            if entry.start == "pre-trained" and entry.on_curves is not None
        )
        layer |= {"algo": next(pretraining), "report_every": 1000}
        result = train(
            # The run's own files of code may no longer exist: the code below is their copy.
            resolve_settings([("run", layer)], checked=not model.code.stored).config,
            out=path,
            offline=offline,
            time_limit_s=None,
            command="",
            on_event=on_event,
            code=model.code,
        )
    return result.reason


def _panels(models: Sequence[TrainedModel]) -> list[list[run_figures.Panel]]:
    """A row per task of the first run, with a panel for each start and for a random one."""
    first = models[0]
    stream = first.stream.stream if isinstance(first.stream, MiniBatches) else first.stream
    assert isinstance(stream, CurveStream)
    origins = [algorithm_of(model.config).start_of(model.config) for model in models]
    starts = [
        (f"{origin} ({model.config.algo})", model) for origin, model in zip(origins, models, strict=True)
    ]
    if "random start" not in origins:
        shape, targets = first.source.example_shape, first.source.targets
        _, state = build(first.config, shape, first.device, targets=targets, parts=first.code.parts)
        scratch = replace(first, predict=adapted, states=[state], stream=stream)
        starts.append(("random start", scratch))
    return [[_panel(model, stream, task, title) for title, model in starts] for task in range(TASKS)]


def _panel(model: TrainedModel, stream: CurveStream, task: int, title: str) -> run_figures.Panel:
    """The curve of one task, and those that a start predicts before and after adaptation."""
    # The tasks are the same for all runs. Mini-batches are the run's own, enough for all steps of the figure.
    batches = model.stream
    tasks = MiniBatches(stream, max(STEPS), batches.size) if isinstance(batches, MiniBatches) else stream
    episodes = tasks.episodes(task, 1)
    low, high = stream.family.window
    x = np.linspace(low, high, POINTS)
    truth = stream.curve(task, x)
    support_x_TED = episodes.support_x_TECHW
    on_curve = replace(
        episodes,
        query_x_TECHW=torch.from_numpy(x).to(support_x_TED).view(1, -1, 1),
        query_y_TE=torch.from_numpy(truth).to(support_x_TED).view(1, -1),
    )
    outputs_ITEN = model.outputs(on_curve, max(STEPS))
    curves = []
    for steps in STEPS:
        y = outputs_ITEN[steps, 0, :, 0].double().cpu().numpy()
        curves.append(run_figures.Curve(steps, y, float(((y - truth) ** 2).mean())))
    support_x, support_y = (
        part[0].flatten().double().cpu().numpy() for part in (support_x_TED, episodes.support_y_TE)
    )
    return run_figures.Panel(title, x, truth, support_x, support_y, curves)


def _path_rows(models: Sequence[TrainedModel]) -> list[list[path_figures.PathPanel]]:
    """A row per task of the first run, with a panel for each run."""
    episodes = models[0].stream.episodes(0, TASKS)
    by_model = [_path_panels(model, episodes) for model in models]
    return [list(row) for row in zip(*by_model, strict=True)]


def _path_panels(model: TrainedModel, episodes: Episodes) -> list[path_figures.PathPanel]:
    """The paths of a run's policy in some tasks, before adaptation, after one step and after all steps."""
    steps = model.inner_steps
    walked = walk(
        policies.sampling(model.config, sees_goal=algorithm_of(model.config).sees_goal),
        as_policy(model.derivatives.net),
        model.states[0].frozen(),
        episodes,
        steps,
        inner_rule(model.config),
    )
    measured = [point.experience.measured for point in walked]
    title = f"{algorithm_of(model.config).start_of(model.config)} ({model.config.algo})"
    panels = []
    for task, goal in enumerate(episodes.query_y_TE.tolist()):
        paths, returns = {}, {}
        for taken in sorted({0, min(1, steps), steps}):
            sampled = measured[taken]
            # Without what a state has besides the position, which is the goal that an oracle sees.
            position_EHD = sampled.state_TEHD[task, :PATHS, :, :2].cpu().numpy()
            lengths_E = sampled.alive_TEH[task, :PATHS].sum(-1).int().tolist()
            paths[taken] = [path[:length] for path, length in zip(position_EHD, lengths_E, strict=True)]
            returns[taken] = float(sampled.return_TE[task].mean())
        panels.append(path_figures.PathPanel(title, (goal[0], goal[1]), paths, returns))
    return panels


def _task_pictures(model: TrainedModel) -> list[run_figures.TaskPicture]:
    """The first test tasks with the predictions after all inner steps."""
    episodes = model.stream.episodes(0, TASKS)
    predicted_TE = model.outputs(episodes, model.inner_steps, per_step=False)[-1].argmax(-1).cpu()
    config = model.config

    def shown(x: torch.Tensor) -> NDArray[np.float64]:
        # Ink is drawn dark, whatever its value in the network's input.
        return (1 - x if config.ink == 1 and x.shape[-3] == 1 else x).double().cpu().numpy()

    pictures = []
    for task in range(TASKS):
        by_class = episodes.support_y_TE[task].argsort(stable=True)
        support_NKCHW = episodes.support_x_TECHW[task][by_class].unflatten(0, (config.ways, -1))  # type: ignore[no-untyped-call]
        truth_E = episodes.query_y_TE[task].cpu()
        order = _in_turn(truth_E)
        query, predicted = shown(episodes.query_x_TECHW[task])[order], predicted_TE[task][order].numpy()
        pictures.append(
            run_figures.TaskPicture(shown(support_NKCHW), query, truth_E[order].numpy(), predicted)
        )
    return pictures


def _in_turn(labels_E: torch.Tensor) -> torch.Tensor:
    """The places of one example of each class in turn, so that the first ones cover all classes."""
    earlier_E = torch.tensor([int((labels_E[:place] == label).sum()) for place, label in enumerate(labels_E)])
    return (earlier_E * (int(labels_E.max()) + 1) + labels_E).argsort(stable=True)

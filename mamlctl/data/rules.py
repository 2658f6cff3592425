"""Which settings each data set allows, and which it implies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import LOSSES, Metric
from mamlctl.core.problems import Problem, flag, nearest
from mamlctl.core.user_code.references import is_reference, names_tasks
from mamlctl.data.sets.facts import DataSet
from mamlctl.data.sets.folder_layout import class_level, fraction_problem, has_lists, mixed_folder_problem
from mamlctl.data.sets.registry import (
    absolute_data_set,
    find_data_set,
    has_classes,
    has_rewards,
    is_image_folder,
    is_regression,
    is_table,
    kind_of,
)
from mamlctl.settings.data_settings import DataSettings
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import FIELDS, TrainConfig, improvements_without_meaning

# The usual settings for regression (Finn et al. 2017, section 5.1: 10 points, 25 tasks, one step of 0.01).
REGRESSION_DEFAULTS: Mapping[str, Any] = {
    "algo": "maml",
    "net": "mlp",
    "shots": 10,
    "queries": 10,
    "meta_batch_size": 25,
    "inner_lr": 0.01,
    "inner_steps": 1,
    "eval_inner_steps": 10,
}

# The usual settings for policies (Finn et al. 2017, appendix A.2): 20 trajectories before each inner step.
POLICY_DEFAULTS: Mapping[str, Any] = {
    "algo": "maml",
    "net": "mlp",
    "shots": 20,
    "queries": 20,
    "meta_batch_size": 20,
    "inner_lr": 0.1,
    "inner_steps": 1,
    "eval_inner_steps": 3,
    "epochs": 10,
    "steps_per_epoch": 10,
    "val_tasks": 40,
    "report_every": 1,
    "outer": "trpo",
    "discount": 0.99,
    "gae": 1.0,
}

MAX_KL = 0.01  # the default of --max-kl with --outer trpo, as in the published code (maml_trpo_point.py)

FIGURE_TASKS = 100  # enough to draw a table's curves of adaptation, for a fraction of the test's time

# Settings of a preset that apply to its own data set only, not to another that replaces it.
OF_CLASSES = ("split_scheme", "split_fractions", "classes", "strict", "rotations", "augment")
OF_PIXELS = ("ink", "resize", "normalize", "image_size", "channels")
OF_COLUMNS = ("inputs", "targets")
OF_REWARDS = ("outer", "max_kl", "discount", "gae")
OF_ITS_DATA = (*OF_CLASSES, *OF_PIXELS, *OF_COLUMNS, *OF_REWARDS)

# Settings that the user's tables have too.
OF_OWN_DATA = ("split_seed", "split_fractions", "strict")

# Settings that the user's own tasks do not have, since their code decides.
OF_OTHER_DATA = ("train_shots", "split_seed", *OF_ITS_DATA)

# Settings that only images have, and the reason that an error for regression gives.
OF_IMAGES: Mapping[str, str] = {
    **dict.fromkeys(("ways", "split_seed", "body_epochs", *OF_CLASSES), "has no classes"),
    **dict.fromkeys(("strict", "augment", *OF_PIXELS), "has no images"),
    **dict.fromkeys(("bn", *improvements_without_meaning("no batch norm")), "is learnt without batch norm"),
}


def metric_of(config: DataSettings) -> Metric:
    """The metric by which runs on a data set are scored."""
    return kind_of(config).metric


def without_meaning(config: DataSettings) -> dict[str, str]:
    """The settings that have no meaning for a data set, and the reason that an error gives."""
    settings = {} if has_classes(config) else dict(OF_IMAGES)
    if has_rewards(config):
        settings["loss"] = "has rewards instead of a loss"
    else:
        settings |= dict.fromkeys(OF_REWARDS, "has no rewards")
    if names_tasks(config.dataset):
        return settings | dict.fromkeys(OF_OTHER_DATA, "makes its own tasks")
    settings["task_type"] = "is not code of your own"
    if is_table(config.dataset):
        return {name: why for name, why in settings.items() if name not in OF_OWN_DATA}
    return settings | dict.fromkeys(OF_COLUMNS, "has no columns")


def data_set_defaults(config: DataSettings) -> Mapping[str, Any]:
    """The settings that a data set implies."""
    if is_regression(config):
        return REGRESSION_DEFAULTS
    if has_rewards(config):
        return POLICY_DEFAULTS
    if names_tasks(config.dataset):
        return {}
    folder = Path(absolute_data_set(config.dataset))
    return {"classes": class_level(folder)} if is_image_folder(config.dataset) and folder.is_dir() else {}


def data_set_forced(config: TrainConfig) -> dict[str, Any]:
    """The settings that can have only one value with this data set, and that value."""
    forced: dict[str, Any] = {name: FIELDS[name].default for name in without_meaning(config)}
    if not has_classes(config) or names_tasks(config.dataset):
        return forced
    try:
        data_set = find_data_set(config.dataset)
    except SettingsError:
        return {}
    if not data_set.own_files:
        forced |= {"split_fractions": None, "classes": "top", "strict": False}
    if config.split_scheme not in data_set.split_schemes:
        forced["split_scheme"] = None
    if config.resize not in data_set.resizes:
        forced["resize"] = None
    if _is_grey(config, data_set):
        forced["normalize"] = None
    return forced


def data_set_problems(
    config: TrainConfig, sources: Mapping[str, str], refused_from: Collection[str]
) -> list[Problem]:
    """The settings that do not fit the data set, as (fact, hint) pairs.

    Args:
        config: the settings, after the data set has overridden those of presets and files.
        sources: where each setting comes from.
        refused_from: the sources whose settings must have an effect; others are ignored.
    """
    problems = choice_problems(config)
    if is_image_folder(config.dataset) and sources["classes"] == f"data set {config.dataset}":
        mixed = mixed_folder_problem(Path(absolute_data_set(config.dataset)))
        problems += [mixed] if mixed else []
    if config.classes == "leaf" and has_lists(Path(absolute_data_set(config.dataset))):
        fact = f"--classes leaf has no effect: the classes of {config.dataset} are in its train.csv"
        problems.append((fact, "leave it out"))
    for name, why in without_meaning(config).items():
        if sources[name] in refused_from and getattr(config, name) is not False:
            problems.append((f"{flag(name)} has no meaning: {config.dataset} {why}", "leave it out"))
    if has_rewards(config) and config.net != "mlp":
        fact = f"--net {config.net} is not a policy, but {config.dataset} {kind_of(config).predicate}"
        problems.append((fact, "use --net mlp"))
    of_code = names_tasks(config.dataset)  # whose networks are checked where the shapes are known
    if is_regression(config) and not of_code and config.net != "mlp" and not is_reference(config.net):
        fact = f"--net {config.net} needs images, but {config.dataset} {kind_of(config).predicate}"
        problems.append((fact, "use --net mlp, or net.py:make with your own function"))
    fitting = [loss for loss, metric in LOSSES.items() if metric == metric_of(config)]
    if config.loss in LOSSES and fitting and config.loss not in fitting:
        needed = "classes" if is_regression(config) else "values to predict"
        fact = f"--loss {config.loss} needs {needed}, but {config.dataset} {kind_of(config).predicate}"
        problems.append((fact, f"use {', '.join(fitting)} or loss.py:fn with your own function"))
    return problems


def choice_problems(config: TrainConfig) -> list[Problem]:
    """Choices that the data set does not offer, or the unknown data set, as (fact, hint) pairs."""
    if not has_classes(config) or names_tasks(config.dataset):
        problem = fraction_problem(config.split_fractions) if config.split_fractions else None
        return [problem] if problem else []
    try:
        data_set = find_data_set(config.dataset)
    except SettingsError as error:
        return list(error.problems)
    problems = list[Problem]()
    for name, choices in (("split_scheme", data_set.split_schemes), ("resize", data_set.resizes)):
        value = getattr(config, name)
        if value is not None and value not in choices:
            hint = nearest(value, choices, otherwise=f"use {' or '.join(choices)}")
            problems.append((f"{config.dataset} has no {flag(name)} {value!r}", hint))
    if not data_set.own_files:
        problems += [
            (f"{flag(name)} has no effect: {config.dataset} has its own splits", "leave it out")
            for name in ("split_fractions", "classes", "strict")
            if getattr(config, name) != FIELDS[name].default
        ]
    elif config.split_fractions is not None:
        problem = fraction_problem(config.split_fractions)
        problems += [problem] if problem else []
    if config.normalize == "imagenet" and _is_grey(config, data_set):
        problems.append(("--normalize imagenet is for colours, but the images are grey", "leave it out"))
    return problems


def _is_grey(config: TrainConfig, data_set: DataSet) -> bool:
    return (config.channels or data_set.image_shape_CHW[0]) == 1


def per_step_settings(settings: EvalConfig, config: DataSettings) -> EvalConfig:
    """The settings of a test with those of its scores per inner step in their only form.

    The small networks for regression are always scored after every step.

    Args:
        settings: the settings of the test.
        config: the settings of the run.
    """
    if not has_classes(config):
        settings = replace(settings, per_step=True, per_step_tasks=None)
        # The mean of the returns of several policies is not the return of a policy.
        one = has_rewards(config) and settings.models == "all"
        return replace(settings, models="best") if one else settings
    is_for_all = settings.curve_tasks in (0, settings.tasks)
    return replace(settings, per_step_tasks=None) if is_for_all else settings


def per_step_problems(settings: EvalConfig, config: DataSettings) -> list[Problem]:
    """Why --per-step-tasks has no effect on a test, as (fact, hint) pairs."""
    if settings.per_step_tasks is None:
        return []
    if not has_classes(config):
        why = f"with {config.dataset}, which is always scored after every step, on all tasks"
        return [(f"--per-step-tasks has no effect {why}", "leave it out")]
    return (
        [] if settings.per_step else [("--per-step-tasks has no effect without --per-step", "add --per-step")]
    )


def with_figure(settings: EvalConfig) -> EvalConfig:
    """The settings of a test that also measures the curve of adaptation in the report of a table."""
    return settings if settings.per_step else replace(settings, per_step=True, per_step_tasks=FIGURE_TASKS)

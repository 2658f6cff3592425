"""The settings of an evaluation, completed from those of the run and checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.problems import Problem, flag
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.rules import data_set_defaults, per_step_problems
from mamlctl.data.sets.folder_layout import mixed_folder_problem
from mamlctl.data.sets.registry import (
    absolute_data_set,
    find_data_set,
    has_classes,
    has_rewards,
    is_image_folder,
    is_table,
    kind_of,
)
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.devices import device_problems, open_device
from mamlctl.experiments.settings import fill_defaults
from mamlctl.experiments.training_images import keeps_split, stored_digests
from mamlctl.run_folder import RunFolder
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.rules import limit_problems
from mamlctl.settings.schema import TrainConfig


def evaluation_setup(
    run: RunFolder, settings: EvalConfig, on_event: OnEvent
) -> tuple[TrainConfig, torch.device, bool]:
    """Complete the run's settings for an evaluation, and open the device.

    Args:
        run: the run.
        settings: the settings of the evaluation, some of which replace the run's.
        on_event: receives notices.

    Returns:
        The settings, the device, and whether the evaluation keeps the split of the run, as `keeps_split`
        says, which scans the folder of images.

    Raises:
        SettingsError: the run does not support the settings, or the machine does not have the device.
    """
    keeps = keeps_split(run, settings)
    place = run.config.dataset if settings.dataset is None else absolute_data_set(settings.dataset)
    trained = fill_defaults(replace(run.config, dataset=place) if keeps else run.config)
    problems = limit_problems(settings) + device_problems(settings.device, "float32")
    problems += evaluation_problems(trained, settings)
    problems += [] if keeps else _problems_of_other_data(trained, settings)
    if problems:
        raise SettingsError(problems)
    if keeps:
        config = replace(settings.over(trained), dataset=place)
    else:
        # Digests of images can only be compared if the same filter has shrunk them. Older runs have no
        # digests, and their evaluations keep the other folder's filter.
        config = _on_other_data(trained, settings, keep_filter=stored_digests(run) is not None)
    config = fill_defaults(config)
    device = open_device(config.device, config.precision)
    if config.precision == "tf32" and device.type == "cpu":
        on_event(Notice("the run was trained in tf32, which CPUs do not have: evaluating in float32"))
    return config, device, keeps


def _on_other_data(trained: TrainConfig, settings: EvalConfig, *, keep_filter: bool) -> TrainConfig:
    """The run's settings, with those of another data set and the values that the evaluation replaces.

    `keep_filter` keeps the run's --resize if both data sets are folders.
    """
    config = settings.over(trained)
    assert settings.dataset is not None
    other = replace(config, dataset=absolute_data_set(settings.dataset))
    folders = is_image_folder(settings.dataset) and is_image_folder(trained.dataset)
    # Settings of the data set are those of the other one; the input of the network stays the same. Curves and
    # the user's own images do not define the value of ink, so the run's value is used.
    keeps_ink = not has_classes(other) or find_data_set(settings.dataset).own_files
    return replace(
        other,
        split_scheme=None,
        split_fractions=None,
        classes=settings.classes or data_set_defaults(other).get("classes", "top"),
        resize=config.resize if folders and keep_filter else None,
        rotations=None,
        ink=config.ink if keeps_ink else None,
    )


def _problems_of_other_data(trained: TrainConfig, settings: EvalConfig) -> list[Problem]:
    """Why the run cannot be evaluated on the other data set, as (fact, hint) pairs."""
    if settings.dataset is None:
        return []
    other = replace(trained, dataset=settings.dataset)
    if names_tasks(settings.dataset) and names_tasks(trained.dataset):
        fact = f"{settings.dataset} is other code than that of the run, which its folder contains"
        return [(fact, "leave out --dataset, or train a new run")]
    kind, trained_on = kind_of(other), kind_of(trained)
    if kind != trained_on:
        fact = f"{settings.dataset} {kind.predicate}, but the run was trained on {trained_on.noun}"
        return [(fact, f"test it on {trained_on.noun}")]
    if is_table(settings.dataset):
        fact = f"{settings.dataset} differs from the table that the run was trained on"
        return [(fact, "give it to the run as new tasks, with --support and --query")]
    if not has_classes(other):
        return []
    data_set = find_data_set(settings.dataset)
    if data_set.open_shaped is None and data_set.image_shape_CHW[0] == 3 and trained.channels == 1:
        fact = f"{settings.dataset} has colour images, but the run was trained on grey ones"
        return [(fact, "train with --channels 3, or test on grey images")]
    if data_set.own_files and settings.classes is None:
        mixed = mixed_folder_problem(Path(data_set.name))
        return [mixed] if mixed else []
    return []


def evaluation_problems(trained: TrainConfig, settings: EvalConfig) -> list[Problem]:
    """Settings that the run's algorithm or data set does not support, as (fact, hint) pairs."""
    entry, problems = algorithm_of(trained), list[Problem]()
    if settings.allow_overlap and (settings.dataset is None or settings.split == "train"):
        needed = "without --dataset" if settings.dataset is None else "with --split train"
        problems.append((f"--allow-overlap has no effect {needed}", "leave it out"))
    regression, predicate = not has_classes(trained), kind_of(trained).predicate
    problems += per_step_problems(settings, trained)
    unused = {name: f"--algo {trained.algo}: {why}" for name, why in entry.unsupported.items()}
    fixed = {"inner_steps": "eval_inner_steps", "adapts": "adapts"}
    unused |= {
        name: f"--algo {trained.algo}, which fixes it"
        for name, setting in fixed.items()
        if setting in entry.forced
    }
    if settings.disjoint and (regression or names_tasks(trained.dataset)):
        problems.append((f"--disjoint is for images, but {trained.dataset} {predicate}", "leave it out"))
    if regression:
        unused["bn"] = f"{trained.dataset}, whose network has no batch norm"
        unused["ways"] = f"{trained.dataset}, whose tasks have no classes"
        if settings.label_permutations != 1:
            fact = f"--label-permutations reorders classes, but {trained.dataset} {predicate}"
            problems.append((fact, "leave it out"))
    if has_rewards(trained) and settings.models == "ensemble":
        fact = "--models is ensemble, but the mean of the returns of policies is not that of a policy"
        problems.append((fact, "use --models best"))
    if names_tasks(trained.dataset):
        sizes = {name: getattr(trained, name) for name in ("ways", "shots", "queries") if name not in unused}
        problems += [
            (f"{flag(name)} is {other}, but it is {size} in the tasks of {trained.dataset}", "leave it out")
            for name, size in sizes.items()
            if (other := getattr(settings, name)) not in (None, size)
        ]
    if entry.learns_rates(trained):
        unused["inner_lr"] = f"--algo {trained.algo}: the rates were learnt"
    if settings.adapts is not None and settings.adapts not in entry.may_adapt:
        fact = f"--adapts {settings.adapts} has no effect with --algo {trained.algo}"
        problems.append((fact, f"use {' or '.join(entry.may_adapt)}"))
    if settings.dataset is None:
        unused["classes"] = "the data of the run; it is for --dataset"
    elif not is_image_folder(settings.dataset):
        unused["classes"] = f"{settings.dataset}, which is not a folder"
    for name, why in unused.items():
        if getattr(settings, name, None) is not None:
            problems.append((f"{flag(name)} has no effect with {why}", "leave it out"))
    return problems

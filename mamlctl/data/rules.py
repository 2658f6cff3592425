"""Which settings go with which data set, and what a data set implies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import Metric
from mamlctl.core.problems import Problem, flag, nearest
from mamlctl.data.sets import image_folder
from mamlctl.data.sets.registry import find_data_set, is_curve_family
from mamlctl.settings.schema import FIELDS, TrainConfig, improvements_without_meaning

# What curves are usually learnt with (Finn et al. 2017, section 5.1: 10 points, 25 tasks, one step of 0.01).
CURVE_DEFAULTS: dict[str, Any] = {
    **{"algo": "maml", "net": "mlp", "shots": 10, "queries": 10, "meta_batch_size": 25},
    **{"inner_lr": 0.01, "inner_steps": 1, "eval_inner_steps": 10},
}

# What only images have.
OF_IMAGES = dict.fromkeys(
    ("ways", "split_scheme", "split_seed", "split_fractions", "strict", "rotations", "augment"),
    "has no classes",
)

OF_IMAGES |= dict.fromkeys(("ink", "resize", "normalize", "image_size", "channels"), "has no images")

OF_IMAGES |= dict.fromkeys(
    ("bn", *improvements_without_meaning("no batch norm")), "is learnt without batch norm"
)

# What a preset says of one data set's images, and not of another's.
OF_ITS_IMAGES = (
    *("split_scheme", "split_fractions", "strict", "rotations", "augment"),
    *("ink", "resize", "normalize", "image_size", "channels"),
)


def metric_of(dataset: str) -> Metric:
    """How runs on a data set are scored."""
    return "mse" if is_curve_family(dataset) else "accuracy"


def set_defaults(name: str) -> Mapping[str, Any]:
    """The settings that `--dataset name` implies."""
    return CURVE_DEFAULTS if is_curve_family(name) else {}


def set_forced(config: TrainConfig) -> dict[str, Any]:
    """The settings that can have one value only with the data set, and that value."""
    if is_curve_family(config.dataset):
        return {setting: FIELDS[setting].default for setting in OF_IMAGES}
    try:
        data_set = find_data_set(config.dataset)
    except SettingsError:
        return {}
    forced: dict[str, Any] = {} if data_set.own_files else {"split_fractions": None, "strict": False}
    if config.split_scheme not in data_set.split_schemes:
        forced["split_scheme"] = None
    if config.resize not in data_set.resizes:
        forced["resize"] = None
    if (config.channels or data_set.image_shape_CHW[0]) == 1:
        forced["normalize"] = None
    return forced


def set_problems(config: TrainConfig, sources: Mapping[str, str], given: Sequence[str]) -> list[Problem]:
    """What does not go with the data set, of what comes from a source in `given`."""
    problems = choice_problems(config)
    if not is_curve_family(config.dataset):
        return problems
    for name, why in OF_IMAGES.items():
        if sources[name] in given and getattr(config, name) is not False:
            problems.append((f"{flag(name)} has no meaning: {config.dataset} {why}", "leave it out"))
    if config.net != "mlp":
        problems.append(
            (f"--net {config.net} needs images, but {config.dataset} has curves", "use --net mlp")
        )
    return problems


def choice_problems(config: TrainConfig) -> list[Problem]:
    """What the data set does not have of what the settings ask: (fact, way out) pairs."""
    if is_curve_family(config.dataset):
        return []
    try:
        data_set = find_data_set(config.dataset)
    except SettingsError as error:
        return list(error.problems)
    problems = []
    for name, known in (("split_scheme", data_set.split_schemes), ("resize", data_set.resizes)):
        value = getattr(config, name)
        if value is not None and value not in known:
            problems.append(_unknown(f"{config.dataset} has no {flag(name)} {value!r}", value, known))
    if not data_set.own_files:
        for name in ("split_fractions", "strict"):
            if getattr(config, name) != FIELDS[name].default:
                fact = f"{flag(name)} has no effect: {config.dataset} has splits of its own"
                problems.append((fact, "leave it out"))
    elif config.split_fractions is not None:
        problems += filter(None, [image_folder.fraction_problem(config.split_fractions)])
    grey = (config.channels or data_set.image_shape_CHW[0]) == 1
    if grey and config.normalize == "imagenet":
        problems.append(("--normalize imagenet is for colours, but the images are grey", "leave it out"))
    return problems


def _unknown(fact: str, word: str, known: Sequence[str]) -> Problem:
    return fact, nearest(word, known, otherwise=f"use {' or '.join(known)}")

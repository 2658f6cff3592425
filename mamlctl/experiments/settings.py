"""Training settings, completed and checked by the rules of the data set and the algorithm."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import expanded
from mamlctl.core.literals import DEFAULT_LOSSES
from mamlctl.core.problems import flag
from mamlctl.core.user_code.kinds import named_code
from mamlctl.core.user_code.references import absolute, locate, names_tasks
from mamlctl.data.rules import (
    MAX_KL,
    OF_ITS_DATA,
    choice_problems,
    data_set_defaults,
    data_set_forced,
    data_set_problems,
    metric_of,
)
from mamlctl.data.sets.registry import absolute_data_set, find_data_set, has_classes, has_rewards, is_table
from mamlctl.engine.algorithms.rules import (
    algorithm_defaults,
    algorithm_forced,
    algorithm_problems,
    settings_of_algorithm,
)
from mamlctl.settings.merge import COMMAND_LINE, Layer, Resolved, drop_ineffective, fill_schedules, merge
from mamlctl.settings.rules import check
from mamlctl.settings.schema import TrainConfig
from mamlctl.shipped_models import is_model, weights_place


def resolve_settings(layers: Sequence[Layer], *, checked: bool = True) -> Resolved[TrainConfig]:
    """Merge layers of settings with the defaults of the data set and the algorithm, and check them.

    Args:
        layers: the sources of settings and their values, weakest first.
        checked: False accepts settings that break rules between settings, which another layer may repair.

    Raises:
        SettingsError: all problems: unknown names, wrong types, limits, rules between settings.
    """
    # The layers choose the data set and the algorithm, whose defaults then go below them.
    named, _ = merge(TrainConfig, layers)
    chosen, tasks = named.config, None
    if checked and names_tasks(chosen.dataset):
        from mamlctl.data.user_tasks.code import open_tasks  # imports numpy

        tasks = open_tasks(chosen.dataset)  # the user's own tasks decide their sizes
        chosen = replace(chosen, **tasks.form.settings)
    if named.sources["algo"] == "default":
        chosen = replace(chosen, algo=data_set_defaults(chosen).get("algo", chosen.algo))
    of_tasks = {} if tasks is None else tasks.form.defaults | tasks.form.settings
    resolved, problems = merge(TrainConfig, with_defaults(layers, chosen, of_tasks))

    # Values that the algorithm or the data set fixes override presets and files; flags are kept and checked.
    forced = algorithm_forced(resolved.config) | data_set_forced(resolved.config)
    forced |= {} if tasks is None else tasks.form.settings
    resolved = drop_ineffective(resolved, forced)

    config = resolved.config
    if checked:
        problems += check(config) + algorithm_problems(config)
        problems += data_set_problems(config, resolved.sources, COMMAND_LINE)
        problems += [] if tasks is None else tasks.problems(config, resolved.sources, COMMAND_LINE)
    if problems:
        raise SettingsError(problems)
    # Absolute, so that the run finds its data from wherever it is resumed, and child processes their code.
    config = replace(config, **absolute_places(vars(config)))
    if checked:  # raise an error for what does not exist
        for name, reference in named_code(vars(config)).items():
            locate(reference, flag(name))
        if config.init is not None:
            weights_place(config.init)
    return replace(resolved, config=config)


def absolute_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that are paths, or name code in files, with absolute paths."""
    places = {name: absolute(reference) for name, reference in named_code(settings).items()}
    if "dataset" in settings:
        places["dataset"] = absolute_data_set(str(settings["dataset"]))
    init = str(settings.get("init") or "")
    if init and not is_model(init):
        places["init"] = str(expanded(init).absolute())
    return places


def with_defaults(
    layers: Sequence[Layer], chosen: TrainConfig, of_tasks: Mapping[str, Any] | None = None
) -> list[Layer]:
    """The layers with the defaults of the data set and the algorithm.

    The algorithm's defaults go directly below the layer that names the algorithm, so they override a preset
    or a file for another algorithm, which also loses the settings that define that other algorithm.

    Args:
        layers: the sources of settings and their values, weakest first.
        chosen: settings with the data set and the algorithm that the layers choose.
        of_tasks: the settings that the user's own tasks imply.
    """
    dataset, algo = chosen.dataset, chosen.algo
    layers = [(source, _drop_foreign(values, OF_ITS_DATA, "dataset", dataset)) for source, values in layers]
    naming = max((place for place, (_, values) in enumerate(layers) if "algo" in values), default=0)
    weaker = [
        (source, _drop_foreign(values, settings_of_algorithm(str(values.get("algo"))), "algo", algo))
        for source, values in layers[:naming]
    ]
    of_data_set = (f"data set {dataset}", {**data_set_defaults(chosen), **(of_tasks or {})})
    of_algorithm = (f"algorithm {algo}", algorithm_defaults(chosen))
    return [of_data_set, *weaker, of_algorithm, *layers[naming:]]


def _drop_foreign(
    values: Mapping[str, Any], names: Collection[str], owner: str, current: str
) -> dict[str, Any]:
    """Drop the settings `names` from a layer that was written for another data set or algorithm.

    `owner` is the setting "dataset" or "algo", and `current` its value in the merged settings.
    """
    foreign = names if values.get(owner, current) != current else ()
    return {name: value for name, value in values.items() if name not in foreign}


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """Fill in every setting that is None. Raises SettingsError for a choice that the data set lacks."""
    if problems := choice_problems(config):
        raise SettingsError(problems)
    loss = {} if has_rewards(config) else {"loss": DEFAULT_LOSSES[metric_of(config)]}
    if not has_classes(config) or names_tasks(config.dataset):
        # These tasks have none of these choices, and most have outputs instead of ways.
        choices: dict[str, Any] = dict.fromkeys(("split_scheme", "resize", "rotations"), "none")
        if config.outer == "trpo":
            choices["max_kl"] = MAX_KL
        choices |= {"inputs": "x*", "targets": "y*"} if is_table(config.dataset) else {}
        return fill_schedules(config if has_classes(config) else replace(config, ways=1), choices | loss)
    defaults = find_data_set(config.dataset).defaults
    if config.channels == 1:
        defaults["normalize"] = "none"
    return fill_schedules(config, defaults | loss)

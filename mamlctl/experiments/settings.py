"""Settings with all that the data set and the algorithm imply and refuse."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.data.rules import (
    OF_ITS_IMAGES,
    choice_problems,
    data_set_defaults,
    data_set_forced,
    data_set_problems,
)
from mamlctl.data.sets.registry import absolute_data_set, find_data_set, is_curve_family
from mamlctl.engine.algorithms.rules import (
    algorithm_defaults,
    algorithm_forced,
    algorithm_problems,
    settings_of_algorithm,
)
from mamlctl.settings.merge import COMMAND_LINE, Layer, Resolved, drop_ineffective, fill_schedules, merge
from mamlctl.settings.rules import check
from mamlctl.settings.schema import TrainConfig


def resolve_settings(
    layers: Sequence[Layer], *, check_devices: bool = False, checked: bool = True
) -> Resolved[TrainConfig]:
    """Settings with all that the data set and the algorithm imply and refuse.

    Args:
        layers: Where settings come from and what they are, weakest first.
        check_devices: They are to run on this machine, so that its devices count too.
        checked: Without it, settings may break rules that a further layer would repair.

    Raises:
        SettingsError: With every problem: unknown names, wrong types, limits, rules between settings.
    """
    # What the layers name decides whose defaults lie beneath them.
    named, _ = merge(TrainConfig, layers)
    dataset, algo = named.config.dataset, named.config.algo
    if named.sources["algo"] == "default":
        algo = data_set_defaults(dataset).get("algo", algo)
    resolved, problems = merge(TrainConfig, with_defaults(layers, dataset, algo))

    # What presets and files say gives way to what the algorithm and the data set fix; flags are kept.
    forced = algorithm_forced(resolved.config) | data_set_forced(resolved.config)
    resolved = drop_ineffective(resolved, forced)

    config = resolved.config
    if checked:
        problems += check(config) + algorithm_problems(config)
        problems += data_set_problems(config, resolved.sources, COMMAND_LINE)
    if checked and check_devices:
        from mamlctl.engine.devices import device_problems

        problems += device_problems(config.device, config.precision, config.cuda_graph)
    if problems:
        raise SettingsError(problems)
    # A run must find its folder from wherever it is resumed.
    return replace(resolved, config=replace(config, dataset=absolute_data_set(config.dataset)))


def with_defaults(layers: Sequence[Layer], dataset: str, algo: str) -> list[Layer]:
    """The layers with what the data set and the algorithm imply.

    The algorithm's lies below the layer that names it, and so over a preset or file of another algorithm; of
    that one, what the other algorithm implied is left out.
    """
    layers = [(source, _without(values, OF_ITS_IMAGES, "dataset", dataset)) for source, values in layers]
    naming = max((place for place, (_, values) in enumerate(layers) if "algo" in values), default=0)
    weaker = [
        (source, _without(values, settings_of_algorithm(str(values.get("algo"))), "algo", algo))
        for source, values in layers[:naming]
    ]
    of_data_set = (f"data set {dataset}", data_set_defaults(dataset))
    of_algorithm = (f"algorithm {algo}", algorithm_defaults(algo, curves=is_curve_family(dataset)))
    return [of_data_set, *weaker, of_algorithm, *layers[naming:]]


def _without(values: Mapping[str, Any], names: Collection[str], owner: str, current: str) -> dict[str, Any]:
    """A layer's values without those that belong to the `owner` that it names, if that is not the current."""
    foreign = names if values.get(owner, current) != current else ()
    return {name: value for name, value in values.items() if name not in foreign}


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left open. Raises SettingsError for a choice that the data set lacks."""
    if problems := choice_problems(config):
        raise SettingsError(problems)
    if is_curve_family(config.dataset):
        # One output instead of ways; the choices are not read.
        choices = dict.fromkeys(("split_scheme", "resize", "rotations"), "none")
        return fill_schedules(replace(config, ways=1), choices)
    defaults = find_data_set(config.dataset).defaults
    if config.channels == 1:
        defaults["normalize"] = "none"
    return fill_schedules(config, defaults)

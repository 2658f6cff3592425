"""Settings with all that the data set and the algorithm imply and refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem
from mamlctl.data.rules import OF_ITS_IMAGES, choice_problems, set_defaults, set_forced, set_problems
from mamlctl.data.sets.registry import absolute, find, is_curves
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.algorithms.rules import algorithm_defaults, algorithm_problems, forced_settings
from mamlctl.settings.merge import COMMAND_LINE, Layer, Resolved, resolve
from mamlctl.settings.schema import TrainConfig, fill_schedules


def resolve_settings(layers: Sequence[Layer], *, here: bool = False, checked: bool = True) -> Resolved:
    """Settings with all that the data set and the algorithm imply and refuse. Raises SettingsError.

    `here`: they are to run on this machine, so that its devices count too. `checked`: as `resolve` has it.
    """
    from mamlctl.engine.devices import device_problems

    def problems(config: TrainConfig, sources: Mapping[str, str]) -> list[Problem]:
        found = algorithm_problems(config) + set_problems(config, sources, COMMAND_LINE)
        entry = ALGORITHMS.get(config.algo)
        if is_curves(config.dataset) and entry is not None and entry.on_curves is None:
            found.append((f"--algo {config.algo} needs classes, but {config.dataset} has curves", "use maml"))
        return found + (device_problems(config.device, config.precision, config.cuda_graph) if here else [])

    def forced(config: TrainConfig) -> dict[str, Any]:
        return forced_settings(config) | set_forced(config)

    resolved = resolve(layers, with_defaults, problems, forced, checked=checked)
    # A run must find its folder from wherever it is resumed.
    return replace(resolved, config=replace(resolved.config, dataset=absolute(resolved.config.dataset)))


def with_defaults(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with what the data set and the algorithm imply.

    The algorithm's lies below the layer that names it, and so over a preset or file of another algorithm; of
    that one, what the other algorithm implied is left out.
    """
    said = {str(key): value for _, values in layers for key, value in values.items()}
    dataset = str(said.get("dataset", TrainConfig.dataset))
    own = set_defaults(dataset)
    algo = str(said.get("algo", own.get("algo", TrainConfig.algo)))
    layers = [(source, without_foreign_image_settings(values, dataset)) for source, values in layers]
    layer = (f"algorithm {algo}", algorithm_defaults(algo, curves=is_curves(dataset)))
    naming = max((place for place, (_, values) in enumerate(layers) if "algo" in values), default=0)
    before = [(source, _of_any_algorithm(values, algo)) for source, values in layers[:naming]]
    return [(f"data set {dataset}", own), *before, layer, *layers[naming:]]


def without_foreign_image_settings(values: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A layer's values without those of the images of the data set it names, if that is another one."""
    if values.get("dataset", dataset) == dataset:
        return dict(values)
    return {name: value for name, value in values.items() if name not in OF_ITS_IMAGES}


def _of_any_algorithm(values: Mapping[str, Any], algo: str) -> dict[str, Any]:
    """A layer's values without those that belong to the algorithm it names, if that is another one."""
    entry = ALGORITHMS.get(str(values.get("algo", algo)))
    if entry is None or values.get("algo", algo) == algo:
        return dict(values)
    belong = entry.defaults.keys() | entry.forced.keys() | set(entry.exclusive_settings)
    return {name: value for name, value in values.items() if name not in belong}


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left open. Raises SettingsError if the data set lacks such a thing."""
    if problems := choice_problems(config):
        raise SettingsError(problems)
    if is_curves(config.dataset):
        # One output instead of ways; nothing of the others is read.
        none = dict.fromkeys(("split_scheme", "resize", "rotations"), "none")
        return fill_schedules(replace(config, ways=1), none)
    own = find(config.dataset).defaults
    if config.channels == 1:
        own["normalize"] = "none"
    return fill_schedules(config, own)

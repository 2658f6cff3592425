"""The experiments of the record: the YAML files of this folder, checked by the table of settings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import Problem, nearest
from mamlctl.data.sets.registry import has_classes
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.report.published import published_row
from mamlctl.report.table import Published
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import evaluation_settings
from mamlctl.settings.presets import load_file, load_preset
from mamlctl.settings.schema import TrainConfig

FOLDER = Path(__file__).parent
KEYS = ("preset", "settings", "minutes", "seeds", "test", "published")
# Settings that the tool chooses itself: the seed, every batch-norm mode, and where it runs.
CHOSEN = {
    "settings": ("seed", "init_seed", "train_seed", "device", "data_root"),
    "test": ("bn", "checkpoint", "dataset", "device", "data_root"),
}

# What to run first; experiments that are not named come last. On a CPU the cheap ones are first.
ABLATION = tuple(f"omniglot-20w1s-maml{on}" for on in ("", "+msl", "+lslr", "+bnwb+bnrs", "+ca", "+da"))
SINUSOIDS = tuple(f"sinusoid-5s-{algo}" for algo in ("scratch", "maml", "transfer"))
NAVIGATION = tuple(sorted(path.stem for path in FOLDER.glob("navigation-*.yaml")))
OMNIGLOT_5, OMNIGLOT_20 = "omniglot-5w1s-maml++", "omniglot-20w1s-maml++"
FAST_5, FAST_20 = f"{OMNIGLOT_5}-fast", f"{OMNIGLOT_20}-fast"
MINI_IMAGENET = "mini-imagenet-5w1s-maml++"
ORDERS = {
    "cpu": (*SINUSOIDS, *NAVIGATION, FAST_5, FAST_20, MINI_IMAGENET, OMNIGLOT_5, OMNIGLOT_20, *ABLATION),
    "cuda": (OMNIGLOT_20, *ABLATION, MINI_IMAGENET, OMNIGLOT_5, FAST_20, FAST_5, *SINUSOIDS, *NAVIGATION),
}


@dataclass(frozen=True)
class Experiment:
    """One experiment: what to train, with which seeds, how long, and how to test it."""

    name: str
    config: TrainConfig  # with the first seed
    test: EvalConfig
    seeds: tuple[int, ...]
    minutes: float | None  # of training, by the wall clock; None: until the last meta-step
    stated: Mapping[str, Any]  # everything in the file that decides a result
    published: tuple[tuple[Published, int | None], ...]  # each with its number of inner steps

    @property
    def modes(self) -> tuple[str | None, ...]:
        """The batch-norm modes to test; None for curves and policies, whose networks have no batch norm."""
        return ("transductive", "running", "support") if has_classes(self.config) else (None,)


def read_experiment(path: Path) -> Experiment:
    """Read the file of an experiment. Raises SettingsError for a wrong key, setting or value."""
    content = load_file(path)
    if problems := list(_kind_problems(path, content)):
        raise SettingsError(problems)
    problems = [
        (f"unknown key '{key}' in {path}", nearest(key, KEYS, otherwise=f"use {', '.join(KEYS)}"))
        for key in content.keys() - set(KEYS)
    ]
    parts = {key: content.get(key, {}) for key in CHOSEN}
    problems += [
        (f"{path} sets {name} in '{part}', which is chosen by the tool", "leave it out")
        for part, names in CHOSEN.items()
        for name in names
        if name in parts[part]
    ]
    seeds, minutes = content.get("seeds", [0]), content.get("minutes")
    problems += _count_problems(path, seeds, minutes)
    if problems:
        raise SettingsError(problems)
    preset = load_preset(content["preset"]) if "preset" in content else {}
    settings = {**preset, **parts["settings"]}
    layers = [("preset", preset), (str(path), parts["settings"])]
    config = replace(resolve_settings(layers).config, seed=seeds[0])
    return Experiment(
        name=path.stem,
        config=config,
        test=evaluation_settings(parts["test"], str(path)),
        seeds=tuple(seeds),
        minutes=minutes,
        stated={"settings": settings, "minutes": minutes, "test": parts["test"]},
        published=tuple(_published(path, config, row) for row in content.get("published", ())),
    )


def _kind_problems(path: Path, content: Mapping[str, Any]) -> Iterator[Problem]:
    for key, kind, hint in (
        ("preset", str, "write the name of a preset"),
        ("settings", dict, "write one 'name: value' a line below it"),
        ("test", dict, "write one 'name: value' a line below it"),
        ("published", list, 'write a list of rows, e.g. ["maml++"]'),
    ):
        if key in content and not isinstance(content[key], kind):
            yield f"{key} is {content[key]} in {path}", f"{hint}, or leave it out"


def _count_problems(path: Path, seeds: Any, minutes: Any) -> Iterator[Problem]:
    is_list = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not is_list or not seeds or len(set(seeds)) < len(seeds):
        yield f"seeds is {seeds} in {path}", "write different whole numbers, e.g. [0, 1, 2]"
    is_time = type(minutes) in (int, float) and 0 < minutes < math.inf
    if minutes is not None and not is_time:
        yield f"minutes is {minutes} in {path}", "write a number above 0, or leave it out"


def _published(path: Path, config: TrainConfig, row: str) -> tuple[Published, int | None]:
    found = published_row(config.dataset, fill_defaults(config).ways, config.shots, row)
    if found is None:
        fact = f"{path} names the published row '{row}', but published.yaml has none for this task"
        raise SettingsError([(fact, "copy the text of a row in mamlctl/report/published.yaml")])
    return found


def experiments(folder: Path = FOLDER, *, only: str = "*", device: str = "cpu") -> list[Experiment]:
    """The experiments of a folder, in the order in which they are worth running.

    Args:
        folder: the folder of their files.
        only: the name of an experiment, or a pattern such as "sinusoid*".
        device: "cpu" or "cuda".

    Raises:
        SettingsError: a file is wrong, or no name fits `only`.
    """
    names = [path.stem for path in sorted(folder.glob("*.yaml"))]
    chosen = [name for name in names if fnmatchcase(name, only)]
    if not chosen:
        hint = nearest(only, names, otherwise=f"use one of {', '.join(names)}")
        raise SettingsError([(f"there is no experiment '{only}' in {folder}", hint)])
    order = ORDERS[device]
    chosen.sort(key=lambda name: order.index(name) if name in order else len(order))
    return [read_experiment(folder / f"{name}.yaml") for name in chosen]

"""The data sets by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mamlctl.checks import Problem, flag, nearest
from mamlctl.config import FIELDS, TrainConfig
from mamlctl.data import cifar, glyphs, omniglot, split_lists
from mamlctl.data.images import PackedImages
from mamlctl.data.regression import FAMILIES
from mamlctl.errors import SettingsError
from mamlctl.records import OnEvent


class Fetch(Protocol):
    """Get, verify and pack a data set; `source` takes the place of the download."""

    def __call__(
        self, root: Path, *, source: Sequence[Path] | None, offline: bool, force: bool, on_event: OnEvent
    ) -> PackedImages: ...


class OpenPack(Protocol):
    """All images of a data set, shrunk by filter `resize`."""

    def __call__(self, root: Path, resize: str, *, on_event: OnEvent) -> PackedImages: ...


class SplitClasses(Protocol):
    """Class numbers of train, val and test."""

    def __call__(self, packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]: ...


class IsHere(Protocol):
    """Whether `open_pack` needs no `fetch` before it."""

    def __call__(self, root: Path) -> bool: ...


@dataclass(frozen=True)
class DataSet:
    """What can be asked of a data set."""

    name: str
    summary: str
    licence: str
    image_shape_CHW: tuple[int, int, int]
    split_schemes: tuple[str, ...]  # the first is the default
    resizes: tuple[str, ...]  # the first is the default
    rotations: str  # the default
    fetch: Fetch
    open_pack: OpenPack
    split_classes: SplitClasses
    is_here: IsHere


DATA_SETS = {
    "omniglot": DataSet(
        name="omniglot",
        summary="1,623 handwritten characters of 50 alphabets, 20 drawings each",
        licence="MIT (Brenden Lake)",
        image_shape_CHW=(1, omniglot.SMALL, omniglot.SMALL),
        split_schemes=omniglot.SPLIT_SCHEMES,
        resizes=omniglot.RESIZES,
        rotations="augment",
        fetch=omniglot.fetch,
        open_pack=omniglot.open_pack,
        split_classes=omniglot.split_classes,
        is_here=omniglot.is_here,
    ),
    "glyphs": DataSet(
        name="glyphs",
        summary="400 invented characters, 20 drawings each, drawn by code: nothing to download",
        licence="MIT (mamlctl)",
        image_shape_CHW=(1, glyphs.SIDE, glyphs.SIDE),
        split_schemes=glyphs.SPLIT_SCHEMES,
        resizes=glyphs.RESIZES,
        rotations="augment",
        fetch=glyphs.fetch,
        open_pack=glyphs.open_pack,
        split_classes=glyphs.split_classes,
        is_here=glyphs.is_here,
    ),
    "cifar-fs": DataSet(
        name="cifar-fs",
        summary="CIFAR-100's classes in Bertinetto's split, 600 colour images of 32x32 each",
        licence=cifar.TERMS,
        image_shape_CHW=(cifar.CHANNELS, cifar.SIDE, cifar.SIDE),
        split_schemes=("bertinetto",),
        resizes=cifar.RESIZES,
        rotations="none",
        fetch=partial(cifar.fetch, name="cifar-fs"),
        open_pack=partial(cifar.open_pack, name="cifar-fs"),
        split_classes=split_lists.split_classes,
        is_here=cifar.is_here,
    ),
    "fc100": DataSet(
        name="fc100",
        summary="CIFAR-100's classes in Oreshkin's split by superclass, 600 colour images of 32x32 each",
        licence=cifar.TERMS,
        image_shape_CHW=(cifar.CHANNELS, cifar.SIDE, cifar.SIDE),
        split_schemes=("oreshkin",),
        resizes=cifar.RESIZES,
        rotations="none",
        fetch=partial(cifar.fetch, name="fc100"),
        open_pack=partial(cifar.open_pack, name="fc100"),
        split_classes=split_lists.split_classes,
        is_here=cifar.is_here,
    ),
}


NAMES = [*DATA_SETS, *FAMILIES]
# What curves are usually learnt with (Finn et al. 2017, section 5.1: 10 points, 25 tasks, one step of 0.01).
CURVE_DEFAULTS: dict[str, Any] = {
    **{"algo": "maml", "net": "mlp", "shots": 10, "queries": 10, "meta_batch_size": 25},
    **{"inner_lr": 0.01, "inner_steps": 1, "eval_inner_steps": 10},
}
# What only images have.
OF_IMAGES = dict.fromkeys(
    ("ways", "split_scheme", "split_seed", "rotations", "ink", "resize"), "has no classes"
)
OF_IMAGES |= dict.fromkeys(("bn", "bnrs", "bnwb"), "is learnt without batch norm")


def is_curves(name: str) -> bool:
    """Whether the tasks of a data set are curves, not classes of images."""
    return name in FAMILIES


def set_defaults(name: str) -> Mapping[str, Any]:
    """The settings that `--dataset name` implies."""
    return CURVE_DEFAULTS if is_curves(name) else {}


def set_forced(name: str) -> dict[str, Any]:
    """The settings that can have one value only with the data set `name`, and that value."""
    return {setting: FIELDS[setting].default for setting in OF_IMAGES} if is_curves(name) else {}


def set_problems(config: TrainConfig, sources: Mapping[str, str], given: Sequence[str]) -> list[Problem]:
    """What does not go with the data set, of what comes from a source in `given`."""
    problems = choice_problems(config.dataset, split_scheme=config.split_scheme, resize=config.resize)
    if not is_curves(config.dataset):
        return problems
    for name, why in OF_IMAGES.items():
        if sources[name] in given and getattr(config, name) is not False:
            problems.append((f"{flag(name)} has no meaning: {config.dataset} {why}", "leave it out"))
    if config.net != "mlp":
        problems.append(
            (f"--net {config.net} needs images, but {config.dataset} has curves", "use --net mlp")
        )
    return problems


def find(name: str) -> DataSet:
    """The data set `name` of images. Raises SettingsError, with the nearest name, if there is none."""
    if is_curves(name):
        raise SettingsError(
            [
                (
                    f"{name} is drawn anew for every task: there is nothing to fetch",
                    f"mamlctl train --dataset {name}",
                )
            ]
        )
    if name not in DATA_SETS:
        raise SettingsError([_unknown(f"unknown data set {name!r}", name, NAMES)])
    return DATA_SETS[name]


def choice_problems(name: str, *, split_scheme: str | None, resize: str | None) -> list[tuple[str, str]]:
    """What of these the data set `name` does not have: (fact, way out) pairs. None means its default."""
    if is_curves(name):
        return []
    if name not in DATA_SETS:
        return [_unknown(f"unknown data set {name!r}", name, NAMES)]
    problems = []
    for switch, value, known in (
        ("--split-scheme", split_scheme, DATA_SETS[name].split_schemes),
        ("--resize", resize, DATA_SETS[name].resizes),
    ):
        if value is not None and value not in known:
            problems.append(_unknown(f"{name} has no {switch} {value!r}", value, known))
    return problems


def _unknown(fact: str, word: str, known: Sequence[str]) -> tuple[str, str]:
    return fact, nearest(word, known, otherwise=f"use {' or '.join(known)}")


def open_data_set(
    name: str,
    *,
    root: Path,
    split_scheme: str | None = None,
    resize: str | None = None,
    split_seed: int = 0,
    on_event: OnEvent,
) -> tuple[PackedImages, dict[str, NDArray[np.int64]]]:
    """All images and the classes of each split; None means the data set's default.

    Raises SettingsError for a choice that it does not have, DataError if it is absent or damaged.
    """
    problems = choice_problems(name, split_scheme=split_scheme, resize=resize)
    if problems:
        raise SettingsError(problems)
    data_set = DATA_SETS[name]
    packed = data_set.open_pack(root, resize or data_set.resizes[0], on_event=on_event)
    return packed, data_set.split_classes(packed, split_scheme or data_set.split_schemes[0], split_seed)

"""The data sets by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mamlctl.checks import Problem, flag, nearest
from mamlctl.config import FIELDS, TrainConfig
from mamlctl.data import folder, glyphs, listed, omniglot
from mamlctl.data.images import PackedImages, is_packed, load_pack, stream_pack
from mamlctl.data.labelled import reshaped
from mamlctl.data.listed import ListedSet
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


class OpenShaped(Protocol):
    """The same in any shape, made from the originals."""

    def __call__(
        self, root: Path, resize: str, *, side: int, channels: int, on_event: OnEvent
    ) -> PackedImages: ...


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
    rotations: str  # the default, as those of `ink` and `normalize`
    ink: int
    normalize: str
    fetch: Fetch
    open_pack: OpenPack
    split_classes: SplitClasses
    is_here: IsHere
    open_shaped: OpenShaped | None = None
    own_files: bool = False  # whether it is what the user has, so that images may be bad and classes small

    @property
    def defaults(self) -> dict[str, Any]:
        """The settings that the data set decides where nobody else does."""
        channels, side, _ = self.image_shape_CHW
        values = {name: getattr(self, name) for name in ("rotations", "ink", "normalize")}
        values |= {"split_scheme": self.split_schemes[0], "resize": self.resizes[0], "augment": "none"}
        if self.own_files:
            values["split_fractions"] = folder.FRACTIONS
        return values | {"image_size": side, "channels": channels}


def _listed(found: ListedSet, summary: str) -> DataSet:
    return DataSet(
        name=found.name,
        summary=summary,
        licence="ImageNet's terms: for research, not to be passed on",
        image_shape_CHW=(3, listed.SIDE, listed.SIDE),
        split_schemes=found.split_schemes,
        resizes=listed.RESIZES,
        rotations="none",
        ink=0,
        normalize="imagenet",
        fetch=partial(listed.fetch, found),
        open_pack=partial(listed.open_pack, found),
        split_classes=listed.split_classes,
        is_here=partial(listed.is_here, found),
    )


DATA_SETS = {
    "omniglot": DataSet(
        name="omniglot",
        summary="1,623 handwritten characters of 50 alphabets, 20 drawings each",
        licence="MIT (Brenden Lake)",
        image_shape_CHW=(1, omniglot.SMALL, omniglot.SMALL),
        split_schemes=omniglot.SPLIT_SCHEMES,
        resizes=omniglot.RESIZES,
        rotations="augment",
        ink=1,
        normalize="none",
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
        ink=1,
        normalize="none",
        fetch=glyphs.fetch,
        open_pack=glyphs.open_pack,
        split_classes=glyphs.split_classes,
        is_here=glyphs.is_here,
    ),
    "mini-imagenet": _listed(listed.MINI, "100 classes of ImageNet, 600 images each (Vinyals et al. 2016)"),
    "tiered-imagenet": _listed(listed.TIERED, "608 classes of ImageNet, split by kind (Ren et al. 2018)"),
}


NAMES = [*DATA_SETS, *FAMILIES]
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
OF_IMAGES |= dict.fromkeys(("bn", "bnrs", "bnwb"), "is learnt without batch norm")


def is_curves(name: str) -> bool:
    """Whether the tasks of a data set are curves, not classes of images."""
    return name in FAMILIES


def set_defaults(name: str) -> Mapping[str, Any]:
    """The settings that `--dataset name` implies."""
    return CURVE_DEFAULTS if is_curves(name) else {}


def set_forced(config: TrainConfig) -> dict[str, Any]:
    """The settings that can have one value only with the data set, and that value."""
    if is_curves(config.dataset):
        return {setting: FIELDS[setting].default for setting in OF_IMAGES}
    try:
        data_set = find(config.dataset)
    except SettingsError:
        return {}
    forced: dict[str, Any] = {} if data_set.own_files else {"split_fractions": None, "strict": False}
    if config.split_scheme not in data_set.split_schemes:
        forced["split_scheme"] = None
    if config.resize not in data_set.resizes:
        forced["resize"] = None
    return forced


def set_problems(config: TrainConfig, sources: Mapping[str, str], given: Sequence[str]) -> list[Problem]:
    """What does not go with the data set, of what comes from a source in `given`."""
    problems = choice_problems(config)
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


def is_path(name: str) -> bool:
    """Whether a data set is named by where it lies."""
    return name not in NAMES and (os.sep in name or name.startswith((".", "~")) or Path(name).is_dir())


def absolute(name: str) -> str:
    """The name of a data set from wherever it is asked for."""
    return str(Path(name).expanduser().absolute()) if is_path(name) else name


def find(name: str, *, fractions: str | None = None) -> DataSet:
    """The data set `name` of images, or that of a folder, split by `fractions` if it has no splits.

    Raises SettingsError, with the nearest name, if there is none.
    """
    if is_curves(name):
        fact = f"{name} is drawn anew for every task: there is nothing to fetch"
        raise SettingsError([(fact, f"mamlctl train --dataset {name}")])
    if is_path(name):
        return _of_folder(Path(absolute(name)), fractions or folder.FRACTIONS)
    if name not in DATA_SETS:
        raise SettingsError([_unknown(f"unknown data set {name!r}", name, NAMES)])
    return DATA_SETS[name]


def _of_folder(path: Path, fractions: str) -> DataSet:
    schemes = folder.SPLIT_SCHEMES if folder.has_splits(path) else ("fractions",)
    return DataSet(
        name=str(path),
        summary="your own images",
        licence="yours",
        image_shape_CHW=(folder.CHANNELS, folder.SIDE, folder.SIDE),
        split_schemes=schemes,
        resizes=folder.RESIZES,
        rotations="none",
        ink=0,
        normalize="none",
        fetch=partial(folder.fetch, path),
        open_pack=partial(folder.open_pack, path),
        split_classes=partial(folder.split_classes, fractions=fractions),
        is_here=partial(folder.is_here, path),
        open_shaped=partial(folder.open_pack, path),
        own_files=True,
    )


def choice_problems(config: TrainConfig) -> list[Problem]:
    """What the data set does not have of what the settings ask: (fact, way out) pairs."""
    if is_curves(config.dataset):
        return []
    try:
        data_set = find(config.dataset)
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
        problems += filter(None, [folder.fraction_problem(config.split_fractions)])
    grey = (config.channels or data_set.image_shape_CHW[0]) == 1
    if grey and config.normalize == "imagenet":
        problems.append(("--normalize imagenet is for colours, but the images are grey", "leave it out"))
    return problems


def _unknown(fact: str, word: str, known: Sequence[str]) -> Problem:
    return fact, nearest(word, known, otherwise=f"use {' or '.join(known)}")


def open_images(
    data_set: DataSet, root: Path, *, resize: str, side: int, channels: int, on_event: OnEvent
) -> PackedImages:
    """All images with sides of `side`; grey ones stay so, colour ones become grey for one channel.

    Shapes that the data set does not have are made once and kept. Raises DataError as its `open_pack` does.
    """
    if data_set.open_shaped is not None:
        return data_set.open_shaped(root, resize, side=side, channels=channels, on_event=on_event)
    packed = data_set.open_pack(root, resize, on_event=on_event)
    shape = (min(channels, packed.images_MCHW.shape[1]), side, side)
    if packed.images_MCHW.shape[1:] == shape:
        return packed
    path = root / data_set.name / f"{side}x{side}x{shape[0]}-{packed.digest[:12]}.npy"
    if not is_packed(path):
        labels = np.repeat(np.arange(len(packed.names)), packed.counts).tolist()
        images = zip(
            labels, reshaped(packed.images_MCHW, shape, f"{data_set.name}: reshape", on_event), strict=True
        )
        stream_pack(path, shape, packed.names, images)
    return load_pack(path, data_set.name)

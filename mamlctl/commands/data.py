"""From settings to streams of tasks: the data set found, fetched if need be, split and put on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.checks import Problem
from mamlctl.config import TrainConfig, derive
from mamlctl.data.choices import OF_ITS_IMAGES, choice_problems, set_defaults, set_forced, set_problems
from mamlctl.data.disjoint import DisjointTasks
from mamlctl.data.episodes import MiniBatches, Tasks, TaskStream, episode_problems
from mamlctl.data.images import PackedImages, data_root
from mamlctl.data.regression import FAMILIES, CurveStream
from mamlctl.data.sets import absolute, fetch_set, find, is_curves, open_images
from mamlctl.engine.algorithms import ALGORITHMS, algorithm_defaults, algorithm_problems, forced_settings
from mamlctl.engine.devices import DTYPES
from mamlctl.errors import DataError, SettingsError
from mamlctl.layers import COMMAND_LINE, Layer, Resolved, resolve
from mamlctl.records import Notice, OnEvent


@dataclass(frozen=True)
class Source:
    """What the streams' tasks are drawn from."""

    digest: str  # of all images, or of a family of curves
    example_shape: tuple[int, ...]  # C, H, W of images, D of curves
    classes: Mapping[str, int]  # of each split, turns counted as training counts them; empty for curves
    names: Mapping[str, Sequence[str]]  # of every split's classes; empty for curves
    brightness: float | None = None  # mean of stored images, 0 black and 1 white; None for curves


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

    resolved = resolve(layers, implied, problems, forced, checked=checked)
    # A run must find its folder from wherever it is resumed.
    return replace(resolved, config=replace(resolved.config, dataset=absolute(resolved.config.dataset)))


def implied(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with what the data set and the algorithm imply.

    The algorithm's lies below the layer that names it, and so over a preset or file of another algorithm; of
    that one, what the other algorithm implied is left out.
    """
    said = {str(key): value for _, values in layers for key, value in values.items()}
    dataset = str(said.get("dataset", TrainConfig.dataset))
    own = set_defaults(dataset)
    algo = str(said.get("algo", own.get("algo", TrainConfig.algo)))
    layers = [(source, _of_any_set(values, dataset)) for source, values in layers]
    layer = (f"algorithm {algo}", algorithm_defaults(algo, curves=is_curves(dataset)))
    naming = max((place for place, (_, values) in enumerate(layers) if "algo" in values), default=0)
    before = [(source, _of_any_algorithm(values, algo)) for source, values in layers[:naming]]
    return [(f"data set {dataset}", own), *before, layer, *layers[naming:]]


def _of_any_set(values: Mapping[str, Any], dataset: str) -> dict[str, Any]:
    """A layer's values without those of the images of the data set it names, if that is another one."""
    if values.get("dataset", dataset) == dataset:
        return dict(values)
    return {name: value for name, value in values.items() if name not in OF_ITS_IMAGES}


def _of_any_algorithm(values: Mapping[str, Any], algo: str) -> dict[str, Any]:
    """A layer's values without those that belong to the algorithm it names, if that is another one."""
    entry = ALGORITHMS.get(str(values.get("algo", algo)))
    if entry is None or values.get("algo", algo) == algo:
        return dict(values)
    belong = entry.defaults.keys() | entry.fixed.keys() | set(entry.own)
    return {name: value for name, value in values.items() if name not in belong}


def complete(config: TrainConfig) -> TrainConfig:
    """The settings with nothing left open. Raises SettingsError if the data set lacks such a thing."""
    if problems := choice_problems(config):
        raise SettingsError(problems)
    if is_curves(config.dataset):
        # One output instead of ways; nothing of the others is read.
        none = dict.fromkeys(("split_scheme", "resize", "rotations"), "none")
        return derive(replace(config, ways=1), none)
    own = find(config.dataset).defaults
    if config.channels == 1:
        own["normalize"] = "none"
    return derive(config, own)


def open_streams(
    config: TrainConfig,
    splits: Sequence[str],
    device: torch.device,
    *,
    offline: bool,
    on_event: OnEvent,
    stored: Mapping[str, Sequence[str]] | None = None,
    disjoint: bool = False,
) -> tuple[dict[str, Tasks], Source]:
    """A stream of tasks for each split, its images on the device; a data set that is not there is fetched.

    `config`: complete. `stored`: the split that a run began with. `disjoint`: as far as a split allows, its
    tasks share no image. Raises SettingsError for tasks that a split is too small for, DataError for missing
    or damaged data.
    """
    if is_curves(config.dataset):
        family = FAMILIES[config.dataset]
        streams: dict[str, Tasks] = {
            split: CurveStream(family=family, **_common(config, split, device)) for split in splits
        }
        source = Source(family.digest, (1,), {}, {})
    else:
        packed = _open_pack(config, offline=offline, on_event=on_event)
        split = split_of(config, packed, stored)
        streams, pools = _image_streams(
            config, packed, {name: split[name] for name in splits}, device, on_event, disjoint=disjoint
        )
        # Some hundreds of images tell paper from ink; all of a large set would take a second.
        some_MCHW = packed.images_MCHW[:: max(len(packed.images_MCHW) // 500, 1)]
        brightness = float(some_MCHW.mean() / 255)
        shape = (int(config.channels or 1), *packed.images_MCHW.shape[2:])
        names = {name: [packed.names[number] for number in part] for name, part in split.items()}
        source = Source(packed.digest, shape, pools, names, brightness)
    return {split: _in_batches(config, stream) for split, stream in streams.items()}, source


def _common(config: TrainConfig, split: str, device: torch.device) -> dict[str, Any]:
    """What all streams of a split are told."""
    train_seed = config.seed if config.train_seed is None else config.train_seed
    more = split == "train" and config.train_shots is not None
    return {
        "split": split,
        "seed": train_seed if split == "train" else config.eval_seed,
        "shots": config.train_shots if more else config.shots,
        "queries": config.queries,
        "device": device,
        "dtype": DTYPES.get(config.precision, torch.float32),
    }


def _in_batches(config: TrainConfig, stream: Tasks) -> Tasks:
    """The stream, with mini-batches where the inner loop wants smaller ones than the support set."""
    training = stream.split == "train"
    size = config.inner_batch if training else config.eval_inner_batch
    steps = config.inner_steps if training or config.eval_inner_steps is None else config.eval_inner_steps
    return stream if size is None or size >= stream.ways * stream.shots else MiniBatches(stream, steps, size)


def _open_pack(config: TrainConfig, *, offline: bool, on_event: OnEvent) -> PackedImages:
    data_set, root = find(config.dataset), data_root(config.data_root)
    if not data_set.own_files and not data_set.is_here(root):
        if offline:
            message = f"{config.dataset} is not at {root}, and --offline forbids fetching it"
            raise DataError(message, hint=f"mamlctl fetch {config.dataset}")
        on_event(Notice(f"{config.dataset} is not at {root}: fetching it"))
        fetch_set(config.dataset, root, on_event=on_event)
    assert config.image_size is not None and config.channels is not None  # as `complete` leaves them
    packed = open_images(
        data_set,
        root,
        resize=str(config.resize),
        side=config.image_size,
        channels=config.channels,
        on_event=on_event,
    )
    if config.strict and (left_out := packed.facts.get("left_out")):
        named = "; ".join(left_out[:5])
        hint = "mend them or take them away, or leave out --strict"
        raise DataError(f"--strict is on, but {len(left_out)} cannot be used: {named}", hint=hint)
    return packed


def split_of(
    config: TrainConfig, packed: PackedImages, stored: Mapping[str, Sequence[str]] | None = None
) -> dict[str, NDArray[np.int64]]:
    """The classes of train, val and test as the settings (complete) split them, or as a run `stored` them.

    Of the user's own images only: another's classes do not change. Raises DataError for one that is gone.
    """
    if stored and find(config.dataset).own_files:
        places = {name: number for number, name in enumerate(packed.names)}
        if gone := [name for names in stored.values() for name in names if name not in places]:
            message = f"{config.dataset} has no class {gone[0]!r} any more, which the run was split with"
            raise DataError(message, hint="bring it back, or train a new run")
        return {split: np.array([places[name] for name in names], int) for split, names in stored.items()}
    data_set = find(config.dataset, fractions=config.split_fractions)
    return data_set.split_classes(packed, str(config.split_scheme), config.split_seed)


def _large_enough(
    config: TrainConfig,
    packed: PackedImages,
    classes: Mapping[str, NDArray[np.int64]],
    needed: int,
    on_event: OnEvent,
) -> dict[str, NDArray[np.int64]]:
    """The classes with as many images as a task takes; of the user's own images, small ones are left out."""
    small = [number for part in classes.values() for number in part if packed.counts[number] < needed]
    nothing_left = len(small) == sum(map(len, classes.values()))
    if not small or nothing_left or not find(config.dataset).own_files:
        return dict(classes)
    named = ", ".join(f"{packed.names[number]} ({packed.counts[number]})" for number in small[:5])
    told = f"{len(small)} classes have fewer than {needed} images, --shots and --queries together: {named}"
    if config.strict:
        raise DataError(f"{told}, but --strict is on", hint="use fewer --shots or --queries, or add images")
    on_event(Notice(f"left out: {told}{', ...' if len(small) > 5 else ''}"))
    return {split: part[packed.counts[part] >= needed] for split, part in classes.items()}


def _image_streams(
    config: TrainConfig,
    packed: PackedImages,
    splits: Mapping[str, NDArray[np.int64]],
    device: torch.device,
    on_event: OnEvent,
    *,
    disjoint: bool = False,
) -> tuple[dict[str, Tasks], dict[str, int]]:
    needed = max(_common(config, split, device)["shots"] for split in splits) + config.queries
    classes = _large_enough(config, packed, splits, needed, on_event)
    problems: list[Problem] = []
    rotations = str(config.rotations)
    for split in splits:
        common = _common(config, split, device)
        size = {"ways": config.ways, "shots": common["shots"], "queries": common["queries"]}
        problems += episode_problems(
            config.dataset, packed, {split: classes[split]}, **size, rotations=rotations
        )
    if problems:
        raise SettingsError(list(dict.fromkeys(problems)))
    kind = DisjointTasks if disjoint else TaskStream
    streams = {
        split: kind(
            packed,
            classes[split],
            name=config.dataset,
            ways=config.ways,
            rotations=rotations,
            ink=int(config.ink or 0),
            augment=str(config.augment),
            normalize=str(config.normalize),
            channels=config.channels,
            **_common(config, split, device),
        )
        for split in splits
    }
    return dict(streams), {split: stream.pool for split, stream in streams.items()}

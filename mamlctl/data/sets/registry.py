"""The registry of data sets, and how to fetch and open them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import expanded
from mamlctl.core.literals import RESIZES, ClassLevel
from mamlctl.core.problems import nearest
from mamlctl.core.user_code.references import absolute, names_tasks
from mamlctl.data.sets import folder_layout
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.sets.facts import (
    CURVES,
    IMAGES,
    MINI,
    OWN_CLASSES,
    OWN_VALUES,
    REWARDS,
    SIDE,
    TABLE,
    TIERED,
    DataKind,
    DataSet,
    ListedSet,
)
from mamlctl.data.worlds import WORLDS
from mamlctl.settings.data_settings import DataSettings

if TYPE_CHECKING:
    from mamlctl.data.reading.packs import PackedImages
    from mamlctl.data.sets import cifar100, class_splits, glyphs, image_folder, imagenet, omniglot
else:

    class _Later:
        """The functions of a module, which import it when they are called.

        The modules of data sets import numpy and Pillow, which help and the checks of settings do not need.
        """

        def __init__(self, module: str) -> None:
            self._module = f"mamlctl.data.sets.{module}"

        def __getattr__(self, name: str) -> Callable[..., Any]:
            assert name.islower(), f"write {name} into the registry: it is no function"
            return lambda *args, **more: getattr(import_module(self._module), name)(*args, **more)

    cifar100, class_splits, glyphs = map(_Later, ("cifar100", "class_splits", "glyphs"))
    image_folder, imagenet, omniglot = map(_Later, ("image_folder", "imagenet", "omniglot"))


def _cifar(name: str, summary: str, scheme: str) -> DataSet:
    return DataSet(
        name=name,
        summary=summary,
        licence="no licence stated; the author requests a citation of Krizhevsky 2009",
        origin="www.cs.toronto.edu",
        download_bytes=169_001_437,
        image_shape_CHW=(3, 32, 32),
        split_schemes=(scheme,),
        normalize="imagenet",
        prepare=cifar100.prepare,
        open_pack=partial(cifar100.open_pack, name=name),
        split_classes=class_splits.split_classes,
        is_here=cifar100.is_here,
        archives=cifar100.archives,
        folder="cifar-100",
    )


def imagenet_set(listed: ListedSet, summary: str) -> DataSet:
    """A data set that must be packed from the user's own files."""
    return DataSet(
        name=listed.name,
        summary=summary,
        licence="ImageNet's terms: research only, no redistribution",
        origin="your files: --from",
        download_bytes=None,
        image_shape_CHW=(3, SIDE, SIDE),
        split_schemes=listed.split_schemes,
        normalize="imagenet",
        prepare=partial(imagenet.prepare, listed),
        open_pack=partial(imagenet.open_pack, listed),
        split_classes=class_splits.split_classes if listed is MINI else imagenet.split_by_folders,
        is_here=partial(imagenet.is_here, listed),
    )


DATA_SETS = {
    "omniglot": DataSet(
        name="omniglot",
        summary="1,623 handwritten characters from 50 alphabets, 20 drawings each",
        licence="MIT (Brenden Lake)",
        origin="github.com/brendenlake/omniglot",
        download_bytes=9_464_212 + 6_462_886,
        image_shape_CHW=(1, 28, 28),
        split_schemes=("maml++", "vinyals", "lake"),
        resizes=RESIZES,
        rotations="augment",
        ink=1,
        prepare=omniglot.prepare,
        open_pack=omniglot.open_pack,
        split_classes=omniglot.split_classes,
        is_here=omniglot.is_here,
        archives=omniglot.archives,
    ),
    "glyphs": DataSet(
        name="glyphs",
        summary="400 invented characters, 20 drawings each, drawn by code",
        licence="MIT (mamlctl)",
        origin="drawn by mamlctl",
        download_bytes=0,
        image_shape_CHW=(1, 28, 28),
        split_schemes=("own",),
        rotations="augment",
        ink=1,
        prepare=glyphs.prepare,
        open_pack=glyphs.open_pack,
        split_classes=glyphs.split_classes,
        is_here=glyphs.is_here,
    ),
    "mini-imagenet": imagenet_set(MINI, "100 classes from ImageNet, 600 images each (Vinyals et al. 2016)"),
    "tiered-imagenet": imagenet_set(TIERED, "608 classes from ImageNet, split by category (Ren et al. 2018)"),
    "cifar-fs": _cifar("cifar-fs", "CIFAR-100 with the split of Bertinetto et al. 2019", "bertinetto"),
    "fc100": _cifar("fc100", "CIFAR-100, split by superclass (Oreshkin et al. 2018)", "oreshkin"),
}

NAMES = [*DATA_SETS, *FAMILIES, *WORLDS]
TABLE_ENDINGS = (".csv", ".npz")


def kind_of(config: DataSettings) -> DataKind:
    """What the tasks of a data set are made of; images if there is no such data set."""
    if config.dataset in FAMILIES:
        return CURVES
    if config.dataset in WORLDS:
        return REWARDS
    if names_tasks(config.dataset):
        return OWN_VALUES if config.task_type == "regression" else OWN_CLASSES
    return TABLE if is_table(config.dataset) else IMAGES


def has_classes(config: DataSettings) -> bool:
    """Whether the tasks of a data set have classes."""
    return kind_of(config).metric == "accuracy"


def is_regression(config: DataSettings) -> bool:
    """Whether the tasks of a data set have values to predict."""
    return kind_of(config).metric == "mse"


def has_rewards(config: DataSettings) -> bool:
    """Whether the tasks of a data set are worlds with rewards, for reinforcement learning."""
    return kind_of(config).metric == "return"


def is_table(name: str) -> bool:
    """Whether `name` is the path of a table of regression tasks, by its ending."""
    return name.lower().endswith(TABLE_ENDINGS) and not expanded(name).is_dir()


def is_image_folder(name: str) -> bool:
    """Whether `name` is the path of a folder of images."""
    is_path = os.sep in name or "/" in name or name.startswith((".", "~")) or Path(name).is_dir()
    return is_path and name not in NAMES and not is_table(name) and not names_tasks(name)


def is_own_data(name: str) -> bool:
    """Whether `name` is the path of the user's own data, which may move to another place."""
    return is_image_folder(name) or is_table(name)


def absolute_data_set(name: str) -> str:
    """Return the name of a data set, with the path of the user's own data or code made absolute."""
    if names_tasks(name):
        return absolute(name)
    return os.path.abspath(expanded(name)) if is_own_data(name) else name  # noqa: PTH100 - without following links


def find_data_set(
    name: str, *, fractions: str | None = None, classes: ClassLevel | None = None, least: int = 1
) -> DataSet:
    """Look up a data set of images.

    Args:
        name: a name in the registry, or the path of a folder of images.
        fractions: for a folder without splits: shares of train, val and test, such as 64-16-20.
        classes: for a folder: which of its folders are classes; None: their content decides.
        least: for a folder: classes with fewer images are in no split.

    Raises:
        SettingsError: there is no such data set, or it has no images.
    """
    if is_table(name):
        raise SettingsError(
            [(f"{name} is a table: there is nothing to fetch", f"run mamlctl train --dataset {name}")]
        )
    if name.endswith(".py"):
        raise SettingsError([(f"--dataset is {name}, without a class", f"write {name}:Tasks, with its name")])
    if name in FAMILIES or name in WORLDS or names_tasks(name):
        fact = f"{name} is generated during training: there is nothing to fetch"
        raise SettingsError([(fact, f"run mamlctl train --dataset {name}")])
    if is_image_folder(name):
        return _of_folder(Path(absolute_data_set(name)), fractions or folder_layout.FRACTIONS, classes, least)
    if name not in DATA_SETS:
        hint = nearest(
            name, NAMES, otherwise=f"use one of {', '.join(NAMES)}, or the path of a folder or table"
        )
        raise SettingsError([(f"unknown data set {name!r}", hint)])
    return DATA_SETS[name]


def _of_folder(path: Path, fractions: str, classes: ClassLevel | None, least: int) -> DataSet:
    has_splits = folder_layout.has_lists(path) or folder_layout.split_folders(path)
    schemes = folder_layout.SPLIT_SCHEMES if has_splits else ("fractions",)
    open_pack = partial(image_folder.open_pack, path, level=classes)
    return DataSet(
        name=str(path),
        summary="your own images",
        licence="yours",
        origin="your files",
        download_bytes=0,
        folder=folder_layout.home_of(path),
        image_shape_CHW=(folder_layout.CHANNELS, folder_layout.SIDE, folder_layout.SIDE),
        split_schemes=schemes,
        resizes=RESIZES,
        prepare=partial(image_folder.prepare, path),
        open_pack=open_pack,
        split_classes=partial(image_folder.split_classes, fractions=fractions, least=least),
        is_here=partial(image_folder.is_here, path),
        open_shaped=open_pack,
        own_files=True,
    )


def fetch_or_open(
    data_set: DataSet,
    root: Path,
    *,
    source: Sequence[Path] | None = None,
    mirrors: Sequence[str] = (),
    offline: bool = False,
    force: bool = False,
    on_event: OnEvent,
) -> PackedImages:
    """Fetch a data set unless it is in the data root, and open it; a second process waits for the first.

    Args:
        data_set: what to fetch.
        root: the data root.
        source: archives and folders to use instead of a download.
        mirrors: URLs of folders to try before the archives' own.
        offline: whether downloads are forbidden.
        force: whether to prepare again a data set that is in the data root.
        on_event: receives notices and progress.

    Raises:
        SettingsError: an option has no effect.
        DataError: the data are missing, damaged, or not those of the data set.
    """
    from mamlctl.data.fetching.downloads import DOWNLOADS
    from mamlctl.data.fetching.locks import locked
    from mamlctl.data.reading.reshaped_packs import drop_reshaped

    name, made_here = data_set.name, data_set.download_bytes == 0
    for switch, has_value in (("--from", source), ("--mirror", mirrors)):
        if made_here and has_value:
            fact = f"{switch} has no effect on {name}, which needs no download"
            raise SettingsError([(fact, "leave it out")])
    force = force and bool(made_here or source or data_set.archives)
    with ExitStack() as stack:
        if force or not data_set.is_here(root):  # otherwise nothing is written, and the root may be read-only
            stack.enter_context(locked(root / DOWNLOADS / f"{data_set.home(root).name}.lock", name, on_event))
        if force or not data_set.is_here(root):
            _prepare(data_set, root, source, mirrors, offline, on_event)
            drop_reshaped(data_set.home(root))
        elif not made_here:
            flags = "--force" if data_set.archives else "--force --from ..."
            on_event(Notice(f"{name} is already in {root}; {flags} prepares it again"))
        return data_set.open_pack(root, data_set.resizes[0], on_event=on_event)


def _prepare(
    data_set: DataSet,
    root: Path,
    source: Sequence[Path] | None,
    mirrors: Sequence[str],
    offline: bool,
    on_event: OnEvent,
) -> None:
    from mamlctl.data.fetching.downloads import DOWNLOADS, downloaded
    from mamlctl.data.reading.archives import CHECK_FROM

    name = data_set.name
    if source or data_set.archives is None:
        try:
            data_set.prepare(root, source or (), on_event)
        except OSError as error:  # a folder that may not be searched; files have errors of their own
            fact = f"cannot read {error.filename or source}: {error.strerror or error}"
            raise DataError(fact, hint=CHECK_FROM) from error
        return
    if offline:
        message = f"{name} is not in {root}, and --offline forbids downloading it"
        raise DataError(message, hint=f"run mamlctl fetch {name}, or add --from FOLDER")
    on_event(Notice(f"downloading {name} ({data_set.licence})"))
    archives = data_set.archives()  # imports torchvision, which takes seconds
    files = " and ".join(archive.file for archive in archives)
    hint = f"retry, add --mirror URL, or get {files} elsewhere and run mamlctl fetch {name} --from FOLDER"
    with downloaded(archives, root / DOWNLOADS, mirrors=mirrors, hint=hint, on_event=on_event) as paths:
        data_set.prepare(root, paths, on_event)


def open_images(
    data_set: DataSet, root: Path, *, resize: str, side: int, channels: int, on_event: OnEvent
) -> PackedImages:
    """Open all images in one shape; other shapes than the data set's own are made once and kept.

    Args:
        data_set: the data set, which is in the data root.
        root: the data root.
        resize: the filter that shrinks the originals.
        side: height and width in pixels.
        channels: 1 makes colour images grey; 3 leaves grey ones unchanged.
        on_event: receives notices and progress.

    Raises:
        DataError: the data are missing or damaged.
    """
    from mamlctl.data.reading.reshaped_packs import open_reshaped

    if data_set.open_shaped is not None:
        return data_set.open_shaped(root, resize, side=side, channels=channels, on_event=on_event)
    packed = data_set.open_pack(root, resize, on_event=on_event)
    shape = (min(channels, packed.images_MCHW.shape[1]), side, side)
    if packed.images_MCHW.shape[1:] == shape:
        return packed
    return open_reshaped(packed, shape, data_set.home(root), data_set.name, on_event)

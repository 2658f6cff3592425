"""mini-ImageNet from the pickles that are in circulation, written by Python 2 or 3.

They have two forms. `mini-imagenet-cache-*.pkl` (the code of Ren et al. 2018) contain `image_data` and
`class_dict`, class -> places; `miniImageNet_category_split_*.pickle` (the code of Gidaris & Komodakis 2018)
contain `data`, `labels`, and the names of the labels. A place is the position of an image in its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.formatting import plural
from mamlctl.core.literals import SPLITS
from mamlctl.data.reading.archives import open_regular
from mamlctl.data.reading.unpickling import load_arrays
from mamlctl.data.sets.class_splits import listed_split

NAME = "mini-imagenet"
SIDE = 84
PER_CLASS = 600

FILE_NAMES = (
    tuple(f"mini-imagenet-cache-{split}.pkl" for split in SPLITS),
    tuple(f"miniImageNet_category_split_{part}.pickle" for part in ("train_phase_train", "val", "test")),
)

HINT = "download the file again, or get mini-ImageNet in another form"


def cache_files(folder: Path) -> list[Path]:
    """Return the pickles of train, val and test in `folder`, or []. Raises DataError if some are missing."""
    for names in FILE_NAMES:
        paths = [folder / name for name in names]
        present = [path for path in paths if path.is_file()]
        if present and present != paths:
            lacking = next(path for path in paths if path not in present)
            raise DataError(f"{folder} contains {present[0].name}, but not {lacking.name}", hint="add it")
        if present:
            return paths
    return []


def read_mini_cache(
    paths: Sequence[Path], *, per_class: int = PER_CLASS
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield every class and its images_NHWC, one file at a time, in the order of the published list.

    Images that are contiguous in the file are a view, so a file is in memory only once, and only as long as
    one of its views.

    Args:
        paths: the pickles of train, val and test.
        per_class: images per class.

    Raises:
        DataError: a file is missing, damaged, or not mini-ImageNet's; raised when the file is reached.
    """
    read: dict[str, Path] = {}
    for path in paths:
        images_NHWC, places = _read_pickle(path)
        split = _split_of(path, places)
        if split in read:
            message = f"{path} and {read[split]} both contain the classes of {split}"
            raise DataError(message, hint="give one of them")
        read[split] = path
        _check_places(path, places, len(images_NHWC), per_class)
        for name, of in listed_split(NAME).items():
            if of == split:
                yield name, _of_places(images_NHWC, places[name])
        del images_NHWC  # freed before the next file is read
    for split in SPLITS:
        if split not in read:
            message = f"{', '.join(map(str, paths))} contains no classes of {split}"
            raise DataError(message, hint="add its file")


def _read_pickle(path: Path) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]]]:
    """All images_NHWC of a file, and the places of each class."""
    with open_regular(path) as file:
        content = load_arrays(file, str(path))
    fields = {_decoded(key): value for key, value in content.items()} if isinstance(content, dict) else {}
    if "image_data" in fields and "class_dict" in fields:
        return _images(fields["image_data"], path), _by_class(fields["class_dict"], path)
    if "data" in fields and "labels" in fields:
        return _images(fields["data"], path), _by_label(fields, path)
    message = f"{path} contains neither image_data and class_dict nor data and labels"
    raise DataError(message, hint=HINT)


def _decoded(word: object) -> object:
    """A name as text; names are bytes if Python 3 read a pickle of Python 2 and wrote it again."""
    return word.decode("latin-1") if isinstance(word, bytes) else word


def _images(images: object, path: Path) -> NDArray[np.uint8]:
    """The images with channels last."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path} has images of {kind}, not an array of uint8", hint=HINT)
    if images.shape[1:] == (3, SIDE, SIDE):
        return images.transpose(0, 2, 3, 1)
    if images.shape[1:] == (SIDE, SIDE, 3):
        return images
    message = f"{path} has images of shape {images.shape}, not colour images of {SIDE}x{SIDE}"
    raise DataError(message, hint=HINT)


def _by_class(class_dict: object, path: Path) -> dict[str, NDArray[np.int64]]:
    if not isinstance(class_dict, dict):
        raise DataError(f"{path} has a class_dict that is not a dict", hint=HINT)
    return {str(_decoded(name)): _integers(class_places, path) for name, class_places in class_dict.items()}


def _by_label(fields: Mapping[object, object], path: Path) -> dict[str, NDArray[np.int64]]:
    labels = _integers(fields["labels"], path)
    by_label, by_name = fields.get("label2catname"), fields.get("catname2label")
    names: dict[object, object] = {}
    if isinstance(by_label, dict | list):
        names = dict(by_label.items() if isinstance(by_label, dict) else enumerate(by_label))
    elif isinstance(by_name, dict):
        names = {label: name for name, label in by_name.items() if type(label) is int}
    places = {}
    for label in np.unique(labels).tolist():
        name = _decoded(names.get(label))
        if not isinstance(name, str):
            raise DataError(f"{path} has no class name for label {label}", hint=HINT)
        places[name] = np.flatnonzero(labels == label)
    return places


def _integers(values: object, path: Path) -> NDArray[np.int64]:
    """Places or labels as an array."""
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    if isinstance(values, list | tuple) and all(isinstance(value, int | np.integer) for value in values):
        try:
            return np.array(values, dtype=np.int64)
        except OverflowError as error:
            raise DataError(f"{path} has places or labels beyond 64 bits", hint=HINT) from error
    raise DataError(f"{path} has places or labels that are not a list of integers", hint=HINT)


def _split_of(path: Path, classes: Mapping[str, object]) -> str:
    """The split that has exactly these classes. Raises DataError if there is none."""
    listed = listed_split(NAME)
    foreign = sorted(classes.keys() - listed.keys())
    if foreign:
        raise DataError(f"{path} contains {foreign[0]!a:.40}, which is not a class of {NAME}", hint=HINT)
    splits = sorted({listed[name] for name in classes}, key=SPLITS.index)
    if len(splits) != 1:
        message = f"{path} contains classes of {' and '.join(splits) or 'no split'}, not those of one split"
        raise DataError(message, hint=HINT)
    expected = [name for name, split in listed.items() if split == splits[0]]
    lacking = [name for name in expected if name not in classes]
    if lacking:
        missing = f"{len(lacking)} of the {len(expected)} classes of {splits[0]}, for example {lacking[0]}"
        raise DataError(f"{path} lacks {missing}", hint=HINT)
    return splits[0]


def _check_places(path: Path, places: Mapping[str, NDArray[np.int64]], images: int, per_class: int) -> None:
    """Raise DataError unless every class has `per_class` images and every image is in exactly one class."""
    for name, class_places in places.items():
        if len(class_places) != per_class:
            count = f"{len(class_places):,} {plural(len(class_places), 'image')}"
            raise DataError(f"{path} has {count} of {name}, but {NAME} has {per_class:,}", hint=HINT)
    together = np.sort(np.concatenate(list(places.values())))
    if not np.array_equal(together, np.arange(images)):
        message = f"{path} does not assign each of its {images:,} images to exactly one class"
        raise DataError(message, hint=HINT)


def _of_places(images_NHWC: NDArray[np.uint8], places: NDArray[np.int64]) -> NDArray[np.uint8]:
    if (np.diff(places) == 1).all():
        return images_NHWC[places[0] : places[-1] + 1]
    return images_NHWC[places]

"""The layout of a folder of the user's images: which of its folders are splits, and which are classes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from mamlctl.core.errors import DataError
from mamlctl.core.formatting import plural
from mamlctl.core.literals import SPLITS, ClassLevel
from mamlctl.core.problems import Problem
from mamlctl.data.sets.listed_images import COLUMNS, HINT, IMAGES, is_list, listed_files

# The size of mini-ImageNet's images, for which the usual networks are made.
SIDE = 84
CHANNELS = 3
SPLIT_SCHEMES = ("folders", "fractions")
FRACTIONS = "64-16-20"  # classes of mini-ImageNet

# The names of the folders of each split, in lower case.
SPLIT_FOLDERS = {
    "train": ("train", "training", "base"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "novel"),
}

# The suffixes that show that a file is meant as an image. Class folders may also contain images with other
# names, but a LICENSE next to some folders must not decide what the classes are.
IMAGE_SUFFIXES = {
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".j2k",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".pbm",
    ".pcx",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
}

# Suffixes of files that are often next to images, but are not images.
NO_IMAGES = {".txt", ".csv", ".json", ".md", ".xml", ".yaml", ".yml", ".py", ".ini", ".db", ".log", ".html"}


def split_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of each split that `folder` has; empty if its folders are classes.

    Names count in any case if their folders contain no images themselves. The exact names train, val and
    test always count, but one of them alone may be a class, unless it is train without other folders.
    """
    names = [entry.name for entry in _subfolders(folder)] if folder.is_dir() else []
    found = {}
    for split, words in SPLIT_FOLDERS.items():
        # The exact name comes first; then the order of SPLIT_FOLDERS decides.
        spelled = sorted(
            (words.index(name.lower()), name != split, name) for name in names if name.lower() in words
        )
        if spelled:
            found[split] = folder / spelled[0][2]
    exact = [split for split, path in found.items() if path.name == split]
    if names == ["train"] or len(exact) > 1:
        return found
    deep = not any(map(_has_images, found.values()))
    return found if deep and "train" in found and (len(found) > 1 or len(names) == 1) else {}


def has_lists(folder: Path) -> bool:
    """Whether the classes and splits of a folder are in its train.csv, val.csv and test.csv.

    Folders of classes count more than lists, which may describe them.
    """
    # The list is sought first, since there may be thousands of subfolders.
    return is_list(folder / f"{SPLITS[0]}.csv") and {path.name for path in _subfolders(folder)} <= {IMAGES}


def unread_lists(folder: Path) -> Problem | None:
    """Return the (fact, hint) pair that says why the lists of images in a folder are not read."""
    train = folder / f"{SPLITS[0]}.csv"
    known = {f"{word}.csv" for words in SPLIT_FOLDERS.values() for word in words}
    lists = sorted(entry for entry in folder.iterdir() if entry.name.lower() in known)
    if not lists or has_lists(folder):
        return None
    if train in lists and not is_list(train):
        return f"{train} does not have the columns {' and '.join(COLUMNS)}", HINT
    names = " and ".join(path.name for path in lists)
    if train not in lists:
        hint = f"name the lists {', '.join(f'{split}.csv' for split in SPLITS)}"
        return f"{folder} has {names}, but no {train.name}", hint
    odd = next(path.name for path in _subfolders(folder) if path.name != IMAGES)
    hint = f"move the images next to the lists or into a folder {IMAGES}, or remove the lists"
    return f"{folder} has {names}, but also a folder {odd}, so its folders are the classes", hint


def class_level(folder: Path) -> ClassLevel:
    """Return "leaf" if every top folder (of every split) contains only folders, else "top"."""
    if has_lists(folder):
        return "top"
    parts = (split_folders(folder) or {"": folder}).values()
    return "leaf" if contain_only_folders(chain.from_iterable(map(_subfolders, parts))) else "top"


def contain_only_folders(groups: Iterable[Path]) -> bool:
    """Whether none of these folders contains an image itself, but a folder in one of them does."""
    folders = list(groups)
    return not any(map(_has_images, folders)) and any(map(_images_inside, folders))


def class_files(folder: Path, level: ClassLevel) -> dict[str, list[Path]]:
    """Return the files of every class, sorted by name.

    With split folders or lists, the names of classes start with the split, such as train/cat.

    Args:
        folder: the user's folder.
        level: whether classes are the top folders, with files at any depth, or the innermost ones.

    Raises:
        DataError: there are no class folders, or the split folders do not fit together.
    """
    if has_lists(folder):
        return listed_files(folder)
    splits = split_folders(folder)
    if not splits:
        single = level == "top" and folder.is_dir() and len(_subfolders(folder)) < 2
        if single and (problem := unread_lists(folder)):
            raise DataError(problem[0], hint=problem[1])
        return _class_files(folder, level)
    odd = [entry.name for entry in _subfolders(folder) if entry not in splits.values()]
    if "train" not in splits or odd:
        fact = f"also a folder {odd[0]}" if "train" in splits else "no folder train"
        found = " and ".join(sorted(path.name for path in splits.values()))
        hint = "use folders train, val and test, with one folder per class in each"
        raise DataError(f"{folder} has folders {found}, but {fact}", hint=hint)
    if level == "top":  # before the files are listed, which may take long
        names = {split: [entry.name for entry in _subfolders(path)] for split, path in splits.items()}
        _refuse_common_classes(folder, splits, names)
    by_split = {split: _class_files(path, level) for split, path in splits.items()}
    _refuse_common_classes(folder, splits, {split: list(classes) for split, classes in by_split.items()})
    return {
        f"{split}/{name}": files for split, classes in by_split.items() for name, files in classes.items()
    }


def _refuse_common_classes(folder: Path, splits: dict[str, Path], names: dict[str, list[str]]) -> None:
    where: dict[str, Path] = {}
    for split, path in splits.items():
        common = [name for name in names[split] if name in where]
        if common:
            count = f"{len(common)} {plural(len(common), 'class')}"
            places = f"both in {where[common[0]].name} and in {path.name}"
            fact = f"{folder} has {count} {places}, for example {common[0]!r}"
            raise DataError(fact, hint=f"use --dataset {splits['train']}, whose classes are then split")
        where |= dict.fromkeys(names[split], path)


def mixed_folder_problem(folder: Path) -> Problem | None:
    """Return the (fact, hint) pair if a folder contains both images and folders with images.

    The same holds for a folder (or the splits) with some classes that contain images and others that
    contain several folders with images, which may be classes too.
    """
    if has_lists(folder):
        return None
    for place, names, files in _walk(folder):
        images = sum(looks_like_image(file) for file in files)
        if images and (folders := sum(_images_inside(place / name) for name in names)):
            counts = (
                f"{images} {plural(images, 'image')} and {folders} {plural(folders, 'folder')} with images"
            )
            hint = "move the images to a folder of their own, or add --classes top"
            outside = place in (folder, *split_folders(folder).values())
            taken = "leaves them out" if outside else f"makes all of {place.name} one class"
            return f"{place} contains {counts}", f"{hint}, which {taken}"
    return _group_problem(folder)


def _group_problem(folder: Path) -> Problem | None:
    parts = split_folders(folder).values() or [folder]
    tops = chain.from_iterable(_subfolders(part) for part in parts if part.is_dir())
    groups, classes = [], 0
    for top in tops:
        if _has_images(top):
            classes += 1
        elif sum(any(map(looks_like_image, files)) for _, _, files in _walk(top)) > 1:
            groups.append(top)
    if not classes or not groups:
        return None
    with_images = f"{classes} {plural(classes, 'folder')} with images"
    count = f"{len(groups)} {plural(len(groups), 'folder')} with several folders of images"
    name = groups[0].relative_to(folder)
    hint = f"add --classes leaf, which makes each folder in {name} a class, or --classes top, which makes one"
    return f"{folder} contains {with_images} and {count}, such as {name}", hint


def _class_files(folder: Path, level: ClassLevel) -> dict[str, list[Path]]:
    if level == "top":
        return class_folders(folder)
    if not folder.is_dir():
        class_folders(folder)  # raises the error
    leaves = {
        place.relative_to(folder).as_posix(): sorted(
            place / file for file in files if may_be_image(Path(file))
        )
        for place, names, files in _walk(folder)
        if place != folder and (not names or any(map(looks_like_image, files)))
    }
    return dict(sorted(leaves.items()))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` without hidden folders, through links but not in circles."""
    for place, names, files in os.walk(folder, followlinks=True):
        here = Path(place)
        names[:] = [
            name
            for name in names
            if is_visible(name)
            and not ((link := here / name).is_symlink() and here.resolve().is_relative_to(link.resolve()))
        ]
        yield here, names, files


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and is_visible(entry.name))


def looks_like_image(name: str) -> bool:
    """Whether a file of that name is meant as an image."""
    return is_visible(name) and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _has_images(folder: Path) -> bool:
    """Whether a folder itself contains an image."""
    with os.scandir(folder) as entries:
        return any(looks_like_image(entry.name) for entry in entries)


def _images_inside(folder: Path) -> bool:
    """Whether a folder contains an image at any depth."""
    return any(map(looks_like_image, chain.from_iterable(files for _, _, files in _walk(folder))))


def class_folders(path: Path) -> dict[str, list[Path]]:
    """Return the class folders of `path` and the files of each, at any depth, both sorted by name.

    Hidden files and files with the suffixes of `NO_IMAGES` are skipped; a class may be empty. Links to
    nothing, pipes and devices are among the files, so that whoever reads them reports them.

    Raises:
        DataError: `path` is not a folder, or has no subfolders.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder", hint="give a folder that contains one folder per class")
    folders = {
        folder.name: sorted(
            file for file in folder.rglob("*") if may_be_image(file.relative_to(folder)) and not file.is_dir()
        )
        for folder in sorted(path.iterdir())
        if folder.is_dir() and is_visible(folder.name)
    }
    if not folders:
        hint = "put the images of each class into a separate folder"
        raise DataError(f"{path} contains no folders", hint=hint)
    return folders


def may_be_image(name: Path) -> bool:
    """Whether a file or folder of that name may be or contain an image."""
    return all(map(is_visible, name.parts)) and name.suffix.lower() not in NO_IMAGES


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor made by a program for itself, such as __MACOSX."""
    return not name.startswith((".", "__"))


def home_of(folder: Path) -> str:
    """The folder of its packs below the data root: its name, and a digest of its path, which is unique."""
    digest = hashlib.sha256(str(folder).encode(errors="surrogateescape")).hexdigest()
    return f"folders/{folder.name}-{digest[:12]}"


def fraction_problem(fractions: str) -> tuple[str, str] | None:
    """Return the (fact, hint) pair if `fractions` is not valid."""
    try:
        parts = [float(part) for part in fractions.split("-")]
    except ValueError:
        parts = []
    if len(parts) == len(SPLITS) and all(0 <= part < math.inf for part in parts) and parts[0] > 0:
        return None
    return f"--split-fractions is {fractions!r}", "give shares of train, val and test, for example 64-16-20"

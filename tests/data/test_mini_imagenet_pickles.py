"""The pickles of mini-ImageNet in both forms, from Python 2 and 3, and errors that name the wrong file."""

import os
import pickle

import numpy as np
import pytest

from mamlctl.core.errors import DataError
from mamlctl.data.sets.class_splits import SPLITS, listed_split
from mamlctl.data.sets.mini_imagenet_pickles import FILE_NAMES, cache_files, read_mini_cache

PER_CLASS = 2
CLASSES = {
    split: [name for name, of in listed_split("mini-imagenet").items() if of == split] for split in SPLITS
}


def images_of(split):
    """Random images: PER_CLASS of the first class of the split, then of the second, and so on."""
    shape = (len(CLASSES[split]) * PER_CLASS, 84, 84, 3)
    return np.random.default_rng(SPLITS.index(split)).integers(0, 256, shape, dtype=np.uint8)


IMAGES = {split: images_of(split) for split in SPLITS}


def places_of(split):
    return {
        name: list(range(number * PER_CLASS, (number + 1) * PER_CLASS))
        for number, name in enumerate(CLASSES[split])
    }


def cache(split, **changed):
    return {"image_data": IMAGES[split], "class_dict": places_of(split), **changed}


def category(split, first=0, **changed):
    """The second form; labels start at `first`, as those of val start at 64 in some files."""
    names = dict(enumerate(CLASSES[split], first))
    contents = {
        "data": IMAGES[split],
        "labels": [label for label in names for _ in range(PER_CLASS)],
        "catname2label": {name: label for label, name in names.items()},
        "label2catname": names,
        **changed,
    }
    return {key: value for key, value in contents.items() if value is not None}


def in_bytes(contents):
    """The contents with names as bytes, as Python 3 reads a pickle of Python 2 with encoding="bytes"."""
    return {
        key.encode(): {name.encode(): places for name, places in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in contents.items()
    }


def written(folder, caches, *, protocol=4, family=FILE_NAMES[0]):
    """Write the three files; `caches` maps a split to the contents of its file."""
    paths = []
    for split, name in zip(SPLITS, family, strict=True):
        (folder / name).write_bytes(pickle.dumps(caches(split), protocol))
        paths.append(folder / name)
    return paths


def assert_complete(paths):
    images = dict(read_mini_cache(paths, per_class=PER_CLASS))
    assert list(images) == [name for split in SPLITS for name in CLASSES[split]]
    for split in SPLITS:
        for name, places in places_of(split).items():
            assert np.array_equal(images[name], IMAGES[split][places])


FORMS = {
    "cache": cache,
    "cache in bytes": lambda split: in_bytes(cache(split)),
    "cache, planes": lambda split: cache(
        split, image_data=np.ascontiguousarray(IMAGES[split].transpose(0, 3, 1, 2))
    ),
    "cache, planes transposed": lambda split: cache(split, image_data=IMAGES[split].transpose(0, 3, 1, 2)),
    "cache, places in arrays": lambda split: cache(
        split, class_dict={name: np.array(places) for name, places in places_of(split).items()}
    ),
    "category": category,
    "category, labels from 64": lambda split: category(split, first=64),
    "category, only label2catname": lambda split: category(split, catname2label=None),
    "category, names in a list": lambda split: category(split, label2catname=CLASSES[split]),
    "category, only catname2label": lambda split: category(split, label2catname=None),
    "category, labels in an array": lambda split: category(
        split, labels=np.repeat(np.arange(len(CLASSES[split])), PER_CLASS)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form, tmp_path):
    assert_complete(written(tmp_path, FORMS[form]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(protocol, tmp_path):
    assert_complete(written(tmp_path, cache, protocol=protocol))


def test_places_may_be_in_any_order(tmp_path):
    """Images of a class that are not contiguous keep the order of the list in the file."""
    step = {split: len(CLASSES[split]) for split in SPLITS}

    def apart(split):
        mixed = np.concatenate([IMAGES[split][number::PER_CLASS] for number in range(PER_CLASS)])
        places = {name: [number, number + step[split]] for number, name in enumerate(CLASSES[split])}
        return cache(split, image_data=mixed, class_dict=places)

    assert_complete(written(tmp_path, apart))


def test_contiguous_images_are_not_copied(tmp_path):
    classes = list(read_mini_cache(written(tmp_path, cache), per_class=PER_CLASS))
    assert not any(images.flags.owndata for _, images in classes)
    assert np.shares_memory(classes[0][1].base, classes[1][1].base)


@pytest.mark.parametrize("family", FILE_NAMES, ids=["cache", "category"])
def test_files_are_found_by_their_names(family, tmp_path):
    assert cache_files(tmp_path) == []
    paths = [tmp_path / name for name in family]
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=f"contains {family[1]}, but not {family[0]}"):
        cache_files(tmp_path)
    for path in paths:
        path.write_bytes(b"")
    assert cache_files(tmp_path) == paths


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def places_with(**changed):
    return cache("val", class_dict={**places_of("val"), **changed})


FIRST, SECOND = CLASSES["val"][:2]
WRONG = {
    "nothing": ({}, "contains neither image_data and class_dict nor data and labels"),
    "no dict": ([IMAGES["val"]], "contains neither image_data and class_dict"),
    "floats": (cache("val", image_data=IMAGES["val"].astype("f4")), "has images of float32, not an array"),
    "list": (cache("val", image_data=[1]), "has images of list, not an array of uint8"),
    "small": (
        cache("val", image_data=IMAGES["val"][:, ::2, ::2]),
        r"has images of shape \(32, 42, 42, 3\), not colour",
    ),
    "grey": (
        cache("val", image_data=IMAGES["val"][..., 0]),
        r"has images of shape \(32, 84, 84\), not colour",
    ),
    "class_dict": (cache("val", class_dict=[]), "has a class_dict that is not a dict"),
    "unknown class": (
        places_with(n99999999=[0, 1]),
        "contains 'n99999999', which is not a class of mini-imagenet",
    ),
    "no class": (cache("val", class_dict={}), "contains classes of no split"),
    "classes of two splits": (
        places_with(**{CLASSES["test"][0]: [0, 1]}),
        "contains classes of val and test, not those of one split",
    ),
    "missing class": (
        cache("val", class_dict={name: places_of("val")[name] for name in CLASSES["val"][1:]}),
        f"lacks 1 of the 16 classes of val, for example {FIRST}",
    ),
    "too few": (places_with(**{FIRST: [0]}), f"has 1 image of {FIRST}, but mini-imagenet has 2"),
    "too many": (places_with(**{FIRST: [0, 1, 2]}), f"has 3 images of {FIRST}, but mini-imagenet has 2"),
    "twice": (places_with(**{FIRST: [0, 0]}), "does not assign each of its 32 images to exactly one class"),
    "in two classes": (places_with(**{FIRST: places_of("val")[SECOND]}), "does not assign each of its 32"),
    "too large": (places_with(**{FIRST: [0, 32]}), "does not assign each of its 32 images to exactly one"),
    "negative": (places_with(**{FIRST: [0, -1]}), "does not assign each of its 32 images to exactly one"),
    "huge": (places_with(**{FIRST: [0, 2**70]}), "has places or labels beyond 64 bits"),
    "text": (places_with(**{FIRST: ["a", "b"]}), "has places or labels that are not a list of integers"),
    "too few images": (cache("val", image_data=IMAGES["val"][:-1]), "does not assign each of its 31 images"),
    "no names": (category("val", catname2label=None, label2catname=None), "has no class name for label 0"),
    "names that are lists": (category("val", label2catname=[[]] * 16), "has no class name for label 0"),
    "too few labels": (category("val", labels=category("val")["labels"][:-1]), "has 1 image of n"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_error_names_the_wrong_file(wrong, tmp_path):
    contents, match = WRONG[wrong]
    paths = written(tmp_path, lambda split: contents if split == "val" else cache(split))
    with pytest.raises(DataError, match=f"mini-imagenet-cache-val.pkl {match}") as raised:
        list(read_mini_cache(paths, per_class=PER_CLASS))
    assert "\n" not in raised.value.message + raised.value.hint and raised.value.hint


def test_files_that_are_not_the_complete_data_set_are_refused(tmp_path):
    paths = written(tmp_path, cache)
    for files, match in (
        (paths[:2], r"cache-val.pkl contains no classes of test"),
        ([paths[0], paths[0]], "cache-train.pkl and .*cache-train.pkl both contain the classes of train"),
        ([*paths, tmp_path / "none.pkl"], "there is no .*none.pkl"),
        ([], "contains no classes of train"),
    ):
        with pytest.raises(DataError, match=match):
            list(read_mini_cache(files, per_class=PER_CLASS))


def test_attack_and_truncated_file_are_refused(tmp_path):
    mark = tmp_path / "ran"
    paths = written(tmp_path, lambda split: {**cache(split), "labels": Touch(mark)})
    with pytest.raises(DataError, match=r"cache-train.pkl is refused: it uses 'posix.system'"):
        list(read_mini_cache(paths, per_class=PER_CLASS))
    assert not mark.exists()
    paths = written(tmp_path, cache)
    paths[2].write_bytes(paths[2].read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cache-test.pkl is cut off"):
        list(read_mini_cache(paths, per_class=PER_CLASS))

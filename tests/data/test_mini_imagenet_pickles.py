"""The pickles of mini-ImageNet: either form, either layout, by Python 2 or 3; every other file is named."""

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
    """Random images, PER_CLASS of each class of the split in turn."""
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
    """The other form; labels count from `first`, as those of val do from 64 in some files."""
    names = dict(enumerate(CLASSES[split], first))
    held = {
        "data": IMAGES[split],
        "labels": [label for label in names for _ in range(PER_CLASS)],
        "catname2label": {name: label for label, name in names.items()},
        "label2catname": names,
        **changed,
    }
    return {key: value for key, value in held.items() if value is not None}


def in_bytes(held):
    """Names as bytes, as Python 3 leaves them that read Python 2's with encoding="bytes"."""
    return {
        key.encode(): {name.encode(): places for name, places in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in held.items()
    }


def written(folder, caches, *, protocol=4, family=FILE_NAMES[0]):
    """The three files; `caches`: split -> what its file holds."""
    paths = []
    for split, name in zip(SPLITS, family, strict=True):
        (folder / name).write_bytes(pickle.dumps(caches(split), protocol))
        paths.append(folder / name)
    return paths


def assert_whole(paths):
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
    "cache, planes turned": lambda split: cache(split, image_data=IMAGES[split].transpose(0, 3, 1, 2)),
    "cache, places in arrays": lambda split: cache(
        split, class_dict={name: np.array(places) for name, places in places_of(split).items()}
    ),
    "category": category,
    "category, labels from 64": lambda split: category(split, first=64),
    "category, names by label alone": lambda split: category(split, catname2label=None),
    "category, names in a list": lambda split: category(split, label2catname=CLASSES[split]),
    "category, labels by name alone": lambda split: category(split, label2catname=None),
    "category, labels in an array": lambda split: category(
        split, labels=np.repeat(np.arange(len(CLASSES[split])), PER_CLASS)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images(form, tmp_path):
    assert_whole(written(tmp_path, FORMS[form]))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol(protocol, tmp_path):
    assert_whole(written(tmp_path, cache, protocol=protocol))


def test_places_in_any_order(tmp_path):
    """Images of a class that lie apart come in the order of the file's list."""
    step = {split: len(CLASSES[split]) for split in SPLITS}

    def apart(split):
        mixed = np.concatenate([IMAGES[split][number::PER_CLASS] for number in range(PER_CLASS)])
        places = {name: [number, number + step[split]] for number, name in enumerate(CLASSES[split])}
        return cache(split, image_data=mixed, class_dict=places)

    assert_whole(written(tmp_path, apart))


def test_images_together_are_not_copied(tmp_path):
    classes = list(read_mini_cache(written(tmp_path, cache), per_class=PER_CLASS))
    assert not any(images.flags.owndata for _, images in classes)
    assert np.shares_memory(classes[0][1].base, classes[1][1].base)


@pytest.mark.parametrize("family", FILE_NAMES, ids=["cache", "category"])
def test_files_are_found_by_their_names(family, tmp_path):
    assert cache_files(tmp_path) == []
    paths = [tmp_path / name for name in family]
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=f"holds {family[1]}, but not {family[0]}"):
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
    "nothing": ({}, "holds neither image_data and class_dict nor data and labels"),
    "no dict": ([IMAGES["val"]], "holds neither image_data and class_dict"),
    "floats": (cache("val", image_data=IMAGES["val"].astype("f4")), "has images of float32, not an array"),
    "list": (cache("val", image_data=[1]), "has images of list, not an array of uint8"),
    "small": (
        cache("val", image_data=IMAGES["val"][:, ::2, ::2]),
        r"has images in the shape \(32, 42, 42, 3\), not colour",
    ),
    "grey": (
        cache("val", image_data=IMAGES["val"][..., 0]),
        r"has images in the shape \(32, 84, 84\), not colour",
    ),
    "class_dict": (cache("val", class_dict=[]), "has a class_dict that is no dict"),
    "foreign class": (places_with(n99999999=[0, 1]), "holds 'n99999999', which is no class of mini-imagenet"),
    "no class": (cache("val", class_dict={}), "holds classes of no split"),
    "classes of two splits": (
        places_with(**{CLASSES["test"][0]: [0, 1]}),
        "holds classes of val and test, not those of one split",
    ),
    "class lacking": (
        cache("val", class_dict={name: places_of("val")[name] for name in CLASSES["val"][1:]}),
        f"lacks 1 of the 16 classes of val, such as {FIRST}",
    ),
    "too few": (places_with(**{FIRST: [0]}), f"holds 1 images of {FIRST}, but mini-imagenet has 2"),
    "too many": (places_with(**{FIRST: [0, 1, 2]}), f"holds 3 images of {FIRST}, but mini-imagenet has 2"),
    "twice": (places_with(**{FIRST: [0, 0]}), "does not put each of its 32 images into one class"),
    "in two classes": (places_with(**{FIRST: places_of("val")[SECOND]}), "does not put each of its 32"),
    "beyond": (places_with(**{FIRST: [0, 32]}), "does not put each of its 32 images into one class"),
    "negative": (places_with(**{FIRST: [0, -1]}), "does not put each of its 32 images into one class"),
    "absurd": (places_with(**{FIRST: [0, 2**70]}), "has absurd places or labels"),
    "no numbers": (places_with(**{FIRST: ["a", "b"]}), "has places or labels that are no list of numbers"),
    "too few images": (cache("val", image_data=IMAGES["val"][:-1]), "does not put each of its 31 images"),
    "no names": (category("val", catname2label=None, label2catname=None), "has no class name for label 0"),
    "names that are none": (category("val", label2catname=[[]] * 16), "has no class name for label 0"),
    "too few labels": (category("val", labels=category("val")["labels"][:-1]), "holds 1 images of n"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_file_is_named(wrong, tmp_path):
    held, match = WRONG[wrong]
    paths = written(tmp_path, lambda split: held if split == "val" else cache(split))
    with pytest.raises(DataError, match=f"mini-imagenet-cache-val.pkl {match}") as raised:
        list(read_mini_cache(paths, per_class=PER_CLASS))
    assert "\n" not in raised.value.message + raised.value.hint and raised.value.hint


def test_files_that_do_not_make_the_set(tmp_path):
    paths = written(tmp_path, cache)
    for files, match in (
        (paths[:2], r"cache-val.pkl holds no classes of test"),
        ([paths[0], paths[0]], "holds the classes of train, as .* does"),
        ([*paths, tmp_path / "none.pkl"], "cannot read .*none.pkl: No such file"),
        ([], "holds no classes of train"),
    ):
        with pytest.raises(DataError, match=match):
            list(read_mini_cache(files, per_class=PER_CLASS))


def test_attack_and_cut_are_told(tmp_path):
    mark = tmp_path / "ran"
    paths = written(tmp_path, lambda split: {**cache(split), "labels": Touch(mark)})
    with pytest.raises(DataError, match=r"cache-train.pkl is refused: it asks for 'posix.system'"):
        list(read_mini_cache(paths, per_class=PER_CLASS))
    assert not mark.exists()
    paths = written(tmp_path, cache)
    paths[2].write_bytes(paths[2].read_bytes()[:-10])
    with pytest.raises(DataError, match=r"cache-test.pkl is cut off"):
        list(read_mini_cache(paths, per_class=PER_CLASS))

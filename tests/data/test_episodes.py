"""Task i is a pure function of (seed, split, i), drawn uniformly, with exactly the stored images."""

import numpy as np
import pytest
import torch
from helpers.data_cases import image_stream, small_pack, stream_settings

from mamlctl.core.errors import SettingsError
from mamlctl.data.counter_rng import random_words
from mamlctl.data.reading.packs import pack
from mamlctl.data.tasks.image_tasks import ImageSettings, episode_problems

UNEVEN = [7, 5, 9, 6, 12, 5, 8, 11]
CLASSES = np.array([6, 1, 2, 4, 7])

SETTINGS = {
    **{"name": "small", "split": "train", "seed": 3, "rotations": "augment", "ink": 1},
    **{"ways": 4, "shots": 2, "queries": 3, "device": torch.device("cpu")},
}


def stream(packed=None, classes=CLASSES, **changes):
    settings = {
        "split": "train",
        "seed": 3,
        "ways": 4,
        "shots": 2,
        "queries": 3,
        "rotations": "augment",
        "ink": 1,
    }
    packed = packed or small_pack(UNEVEN)
    return image_stream(packed, classes, **{**settings, **changes})


def parts(episodes):
    return [episodes.support_x_TECHW, episodes.support_y_TE, episodes.query_x_TECHW, episodes.query_y_TE]


def test_raw_words_are_philox_as_published():
    """Counter 0 and key 0 of Philox4x64-10, from the Random123 paper's known answers (kat_vectors).

    numpy increments the counter before its first block, so the counter starts at -1.
    """
    below = np.array([2**64 - 1] * 4, dtype=np.uint64)
    first = np.random.Philox(counter=below, key=np.zeros(2, dtype=np.uint64)).random_raw(4)
    assert [f"{word:016x}" for word in first] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    assert (random_words(5, "train", 9, 8)[:3] == random_words(5, "train", 9, 3)).all()
    assert random_words(2, "test", 7, 1)[0] == 0x09CCB91FC8351267  # stored runs depend on this value


def test_task_is_the_same_in_every_batch():
    tasks = stream()
    whole = parts(tasks.episodes(40, 6))
    for first, size in ((40, 1), (42, 3), (45, 1)):
        some = parts(stream().episodes(first, size))
        for part, piece in zip(whole, some, strict=True):
            assert torch.equal(part[first - 40 : first - 40 + size], piece)


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": "val"}])
def test_other_seeds_and_splits_draw_other_tasks(change):
    same = {"rotations": "none"}
    image_TNE, _ = stream(**same).indices(0, 20)
    other_TNE, _ = stream(**same, **change).indices(0, 20)
    assert (image_TNE != other_TNE).any((1, 2)).all()


def test_more_queries_keep_the_support_set_and_more_ways_keep_the_first_classes():
    few, many = stream(ways=3, queries=1), stream(ways=3, queries=3)
    assert torch.equal(few.episodes(0, 9).support_x_TECHW, many.episodes(0, 9).support_x_TECHW)
    classes = [
        np.searchsorted(np.cumsum(UNEVEN), stream(ways=ways).indices(0, 9)[0][..., 0], side="right")
        for ways in (2, 5)
    ]
    assert (classes[1][:, :2] == classes[0]).all()


def test_tasks_have_distinct_classes_of_the_split_and_distinct_images_of_the_class():
    image_TNE, _ = stream().indices(0, 300)
    class_TNE = np.searchsorted(np.cumsum(UNEVEN), image_TNE, side="right")
    assert (class_TNE == class_TNE[..., :1]).all()
    assert set(class_TNE.ravel()) == set(CLASSES)
    assert all(len(set(classes)) == 4 for classes in class_TNE[..., 0])
    assert all(len(set(images)) == 5 for images in image_TNE.reshape(-1, 5))
    assert set(image_TNE.ravel()) == {
        image for c in CLASSES for image in range(sum(UNEVEN[:c]), sum(UNEVEN[: c + 1]))
    }


def chi_square(values, bins):
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return ((counts - expected) ** 2 / expected).sum()


def test_classes_images_and_turns_are_uniform():
    tasks = stream(small_pack([10] * 20), np.arange(20), ways=1, shots=1, queries=1)
    image_TNE, turns_TN = tasks.indices(0, 8000)
    # Bounds: the 99.9 % quantiles of chi-square with 19, 9 and 3 degrees of freedom.
    assert chi_square(image_TNE[:, 0, 0] // 10, 20) < 43.8
    assert chi_square(image_TNE[:, 0, 1] % 10, 10) < 27.9
    assert chi_square(turns_TN.ravel(), 4) < 16.3


@pytest.mark.parametrize("rotations", ["augment", "classes", "none"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_images_are_the_stored_ones_and_turned_only_in_training(split, rotations):
    packed = small_pack(UNEVEN)
    tasks = stream(packed, split=split, rotations=rotations)
    image_TNE, turns_TN = tasks.indices(5, 30)
    episodes = tasks.episodes(5, 30)
    assert set(turns_TN.ravel()) == ({0, 1, 2, 3} if split == "train" and rotations != "none" else {0})
    for task in range(30):
        for n in range(4):
            turn = turns_TN[task, n]
            want = [1 - np.rot90(packed.images_MCHW[i, 0], turn) / 255 for i in image_TNE[task, n]]
            got = [*episodes.support_x_TECHW[task, 2 * n : 2 * n + 2]]
            got += [*episodes.query_x_TECHW[task, 3 * n : 3 * n + 3]]
            np.testing.assert_allclose(torch.stack(got)[:, 0].numpy(), want, rtol=0, atol=1e-7)
            assert (episodes.support_y_TE[task, 2 * n : 2 * n + 2] == n).all()
            assert (episodes.query_y_TE[task, 3 * n : 3 * n + 3] == n).all()


def test_turns_as_classes_give_four_times_as_many_classes():
    packed = small_pack([3] * 5)
    tasks = stream(packed, np.arange(5), ways=20, shots=1, queries=1, rotations="classes")
    image_TNE, turns_TN = tasks.indices(0, 10)
    for task in range(10):
        pairs = set(zip(image_TNE[task, :, 0] // 3, turns_TN[task], strict=True))
        assert pairs == {(c, turn) for c in range(5) for turn in range(4)}
    with pytest.raises(SettingsError, match="'test' has 5 classes, but --ways is 20"):
        stream(packed, np.arange(5), split="test", ways=20, shots=1, queries=1, rotations="classes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ink_is_exactly_one_or_zero(dtype):
    packed = small_pack([4, 4])
    packed.images_MCHW[:] = np.where(packed.images_MCHW > 127, 255, 0)
    settings = {
        "classes": np.arange(2),
        "ways": 2,
        "shots": 1,
        "queries": 1,
        "rotations": "none",
        "dtype": dtype,
    }
    ink_one = stream(packed, ink=1, **settings).episodes(0, 5).support_x_TECHW
    ink_zero = stream(packed, ink=0, **settings).episodes(0, 5).support_x_TECHW
    assert ink_one.dtype == ink_zero.dtype == dtype
    assert set(ink_one.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(ink_one + ink_zero, torch.ones_like(ink_one))
    image_TNE, _ = stream(packed, ink=0, **settings).indices(0, 5)
    stored = packed.images_MCHW[image_TNE[..., 0]] / 255
    assert (ink_zero.numpy() == stored).all()


def test_all_problems_are_reported_at_once():
    packed = small_pack([20] * 30)
    sizes = {"ways": 20, "shots": 15, "queries": 10}
    too_few_images = (
        "glyphs has 20 images per class, but --shots 15 + --queries 10 is 25",
        "use --shots and --queries that sum to 20 or fewer",
    )
    for split, classes, count in (("train", np.arange(14), 14), ("test", np.arange(14, 30), 16)):
        settings = stream_settings(split=split, **sizes)
        assert episode_problems(packed, classes, settings, ImageSettings("glyphs")) == [
            (f"glyphs '{split}' has {count} classes, but --ways is 20", f"use --ways {count} or fewer"),
            too_few_images,
        ]
    with pytest.raises(SettingsError) as raised:
        image_stream(packed, np.arange(14, 30), split="test", **sizes)
    assert len(raised.value.problems) == 2


def test_smallest_class_limits_the_size_of_tasks():
    settings = stream_settings(split="train", ways=2, shots=3, queries=3)
    problems = episode_problems(small_pack(UNEVEN), CLASSES, settings, ImageSettings("small"))
    facts = [fact for fact, _ in problems]
    assert facts == ["small has 5 images in its smallest class, but --shots 3 + --queries 3 is 6"]


@pytest.mark.gpu
def test_gpu_gathers_the_same_tasks():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    on_cpu, on_gpu = (stream(device=torch.device(name)).episodes(7, 5) for name in ("cpu", "cuda"))
    for cpu, gpu in zip(parts(on_cpu), parts(on_gpu), strict=True):
        assert gpu.is_cuda
        assert torch.equal(cpu, gpu.cpu())


def colour_pack(side=16):
    """Eight classes of random colour images."""
    pixels = np.random.default_rng(5).integers(0, 256, (40, 3, side, side), dtype=np.uint8)
    return pack(pixels, np.full(8, 5), tuple(f"class{number}" for number in range(8)))


PLAIN = {"rotations": "none", "ink": 0}


def test_colours_are_normalised_with_mean_and_deviation():
    packed = colour_pack()
    plain = stream(packed, **PLAIN).episodes(0, 2).query_x_TECHW
    normalized = stream(packed, normalize="imagenet", **PLAIN).episodes(0, 2).query_x_TECHW
    mean, deviation = (
        torch.tensor(numbers)[:, None, None] for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert torch.allclose(normalized * deviation + mean, plain, atol=1e-6)


def test_each_training_image_is_mirrored_or_not_by_its_own_word():
    packed = colour_pack()
    plain, flipped = (
        torch.cat(parts(stream(packed, augment=augment, **PLAIN).episodes(3, 40))[::2], 1)
        for augment in ("none", "flips")
    )
    same = (plain == flipped).flatten(2).all(-1)
    mirrored = (plain.flip(-1) == flipped).flatten(2).all(-1)
    assert (same ^ mirrored).all()
    assert 0.42 < mirrored.double().mean() < 0.58  # of 800 images, for which 5 standard deviations are 0.09


def test_each_training_image_is_shifted_by_its_own_words():
    packed = colour_pack()
    plain, cropped = (
        torch.cat(parts(stream(packed, augment=augment, **PLAIN).episodes(0, 30))[::2], 1).flatten(0, 1)
        for augment in ("none", "crops")
    )
    shifts = []
    for before, after in zip(plain, cropped, strict=True):
        around = torch.nn.functional.pad(before, (2, 2, 2, 2))
        places = [
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(around[:, down : down + 16, right : right + 16], after)
        ]
        shifts += places
        assert len(places) == 1
    assert len(set(shifts)) == 25


@pytest.mark.parametrize("augment", ["flips", "crops", "flips+crops"])
def test_augmentation_changes_neither_the_tasks_nor_evaluation(augment):
    packed = colour_pack()
    for split in ("val", "test"):
        for one, other in zip(
            parts(stream(packed, split=split, augment=augment, **PLAIN).episodes(0, 3)),
            parts(stream(packed, split=split, **PLAIN).episodes(0, 3)),
            strict=True,
        ):
            assert torch.equal(one, other)
    augmented = stream(packed, augment=augment, **PLAIN)
    assert torch.equal(augmented.episodes(0, 3).class_TN, stream(packed, **PLAIN).episodes(0, 3).class_TN)
    whole, alone = augmented.episodes(5, 4), augmented.episodes(7, 1)
    assert torch.equal(whole.support_x_TECHW[2:3], alone.support_x_TECHW)


def test_images_without_turns_are_read_from_the_mapped_file():
    packed = colour_pack()
    tasks = stream(packed, **PLAIN)
    assert tasks._store_MCHW.data_ptr() == packed.images_MCHW.ctypes.data
    at, _ = tasks.indices(4, 2)
    episodes = tasks.episodes(4, 2)
    expected = torch.from_numpy(packed.images_MCHW[at[:, :, :2]]).flatten(1, 2) / 255
    assert torch.equal(episodes.support_x_TECHW, expected)

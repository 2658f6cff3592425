"""Tasks that share no image: the greatest possible number, unbiased, each a pure function of its number."""

import functools
import hashlib

import numpy as np
import pytest
import torch
from helpers.data_cases import image_stream, small_pack

from mamlctl.core.errors import SettingsError
from mamlctl.core.statistics import mean_ci95
from mamlctl.data.tasks.disjoint import DisjointTasks
from mamlctl.data.tasks.image_tasks import TaskStream

UNEVEN = [7, 5, 9, 6, 12, 5, 8, 31]
COMMON = {"name": "small", "ink": 1}


def stream(counts=UNEVEN, kind=DisjointTasks, **changes):
    settings = {"split": "test", "seed": 3, "ways": 3, "shots": 1, "queries": 1, "rotations": "none"}
    return image_stream(small_pack(counts), np.arange(len(counts)), kind, **COMMON, **settings | changes)


def class_of(image_TNE, counts=UNEVEN):
    return np.searchsorted(np.cumsum(counts), image_TNE[..., 0], side="right")


def most_by_search(blocks, ways):
    """The greatest number of tasks, found by trying every choice of classes for each task."""
    import itertools

    @functools.cache
    def most(left):
        rich = [place for place, count in enumerate(left) if count]
        tries = itertools.combinations(rich, ways)
        after = (tuple(sorted(n - (c in chosen) for c, n in enumerate(left))) for chosen in tries)
        return max((1 + most(smaller) for smaller in after), default=0)

    return most(tuple(sorted(blocks)))


@pytest.mark.parametrize("counts", [UNEVEN[:6], [2, 2, 2, 20], [4, 5, 6, 7, 8], [3, 3, 9]])
@pytest.mark.parametrize("ways", [2, 3])
def test_pass_has_the_greatest_possible_number_of_tasks(counts, ways):
    tasks = stream(counts, ways=ways)
    assert tasks.tasks_once == most_by_search([count // 2 for count in counts], ways)
    image_TNE, _ = tasks.indices(0, tasks.tasks_once)
    assert len(set(image_TNE.ravel())) == image_TNE.size
    assert all(len(set(classes)) == ways for classes in class_of(image_TNE, counts))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 4)])
def test_each_pass_uses_an_image_at_most_once(sizes):
    shots, queries = sizes
    tasks = stream(shots=shots, queries=queries)
    for passes in (1, 2, 5):
        image_TNE, _ = tasks.indices(0, passes * tasks.tasks_once)
        assert np.bincount(image_TNE.ravel()).max() <= passes
        assert (np.diff(image_TNE, axis=-1) != 0).all()
    first, second = np.split(tasks.indices(0, 2 * tasks.tasks_once)[0], 2)
    assert (first != second).any()


def test_every_image_is_used_if_blocks_divide_evenly():
    tasks = stream([8] * 6)
    image_TNE, _ = tasks.indices(0, tasks.tasks_once)
    assert tasks.tasks_once == 8 and sorted(image_TNE.ravel()) == list(range(48))


def test_task_is_the_same_in_every_batch_and_order_of_calls():
    once = stream().tasks_once
    whole, _ = stream().indices(0, 3 * once)
    tasks = stream()
    for first, size in ((2 * once, 3), (0, 2), (once - 1, 2), (once - 2, once + 4)):
        assert (tasks.indices(first, size)[0] == whole[first : first + size]).all()
    episodes = tasks.episodes(once - 1, 2)
    assert torch.equal(episodes.class_TN, torch.from_numpy(class_of(whole[once - 1 : once + 1])))


@pytest.mark.parametrize("change", [{"seed": 4}, {"split": "val"}])
def test_other_seeds_and_splits_draw_other_tasks(change):
    assert (stream().indices(0, 12)[0] != stream(**change).indices(0, 12)[0]).any((1, 2)).all()


def test_tasks_differ_from_those_without_the_setting():
    assert (stream().indices(0, 12)[0] != stream(kind=TaskStream).indices(0, 12)[0]).any()


def test_neither_early_tasks_nor_first_labels_favour_the_large_class():
    early, labels, all_of_it = 0, np.zeros(3), 0
    for seed in range(400):
        tasks = stream(seed=seed)
        is_large_TN = class_of(tasks.indices(0, tasks.tasks_once)[0]) == 7
        early += is_large_TN[: tasks.tasks_once // 2].sum()
        labels += is_large_TN.sum(0)
        all_of_it += is_large_TN.sum()
    half = tasks.tasks_once // 2 / tasks.tasks_once
    # Four standard deviations of the shares.
    assert abs(early / all_of_it - half) < 4 * np.sqrt(half * (1 - half) / all_of_it)
    assert np.abs(labels / all_of_it - 1 / 3).max() < 4 * np.sqrt(2 / 9 / all_of_it)


def test_images_are_equally_often_in_support_and_query():
    use = np.zeros((2, sum(UNEVEN)))
    for seed in range(400):
        tasks = stream(seed=seed)
        image_TNE, _ = tasks.indices(0, tasks.tasks_once)
        for part in range(2):
            use[part] += np.bincount(image_TNE[..., part].ravel(), minlength=sum(UNEVEN))
    large = slice(sum(UNEVEN[:4]), sum(UNEVEN[:5]))  # twelve images, all of which are in six blocks
    assert (use[:, large].sum(0) == use[:, large].sum(0)[0]).all()
    share = use[0, large] / use[:, large].sum(0)
    assert np.abs(share - 0.5).max() < 4 * np.sqrt(0.25 / use[:, large].sum(0)[0])


@pytest.mark.parametrize("rotations", ["augment", "classes"])
def test_turned_training_image_is_the_same_image(rotations):
    tasks = stream(split="train", rotations=rotations)
    image_TNE, turns_TN = tasks.indices(0, tasks.tasks_once)
    assert len(set(image_TNE.ravel())) == image_TNE.size and set(turns_TN.ravel()) == {0, 1, 2, 3}
    assert set(stream().indices(0, 9)[1].ravel()) == {0}


def test_turned_classes_do_not_count_as_classes():
    assert stream([4] * 3, TaskStream, split="train", rotations="classes", ways=12).pool == 12
    with pytest.raises(SettingsError, match="--ways is 12, but --disjoint has 3 classes"):
        stream([4] * 3, split="train", rotations="classes", ways=12)
    with pytest.raises(SettingsError, match="'test' has 3 classes, but --ways is 4"):
        stream([4] * 3, ways=4)


def test_interval_over_disjoint_tasks_covers_new_images_but_the_usual_one_does_not():
    """A model is always right or always wrong on an image; it is right on 70 % of all images.

    There are 20 classes of 20 images, and the tasks have 5 ways.
    """
    covered = {DisjointTasks: 0, TaskStream: 0}
    generator = np.random.default_rng(12)
    for kind in covered:
        for seed in range(40):
            tasks = stream([20] * 20, kind, seed=seed, ways=5)
            image_TN = tasks.indices(0, getattr(tasks, "tasks_once", 600))[0][..., 1]
            for _ in range(25):
                is_right_M = generator.random(400) < 0.7
                mean, half = mean_ci95(is_right_M[image_TN].mean(1))
                covered[kind] += abs(mean - 0.7) <= half
    # Three standard deviations of a share of 1,000. The 600 usual tasks use each of 400 images 7.5 times.
    assert abs(covered[DisjointTasks] / 1000 - 0.95) < 3 * np.sqrt(0.05 * 0.95 / 1000)
    assert covered[TaskStream] / 1000 < 0.65


def test_words_say_how_often_images_are_used():
    tasks = stream([8] * 6)
    assert tasks.words(8) == "8 tasks without reusing an image; 8 requested"
    assert tasks.words(9) == "8 tasks use each image once; 9 tasks use an image up to 2 times"
    assert tasks.words(33).endswith("; 33 tasks use an image up to 5 times")


def test_stored_evaluations_keep_their_tasks():
    image_TNE, _ = stream().indices(0, 40)
    digest = hashlib.sha256(image_TNE.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "4cc1ee5f89ed01b2"

"""The form of the user's own tasks, their digest, and which names mean them."""

import numpy as np
import pytest
import torch

from mamlctl.core.errors import SettingsError
from mamlctl.core.user_code.kinds import named_code
from mamlctl.core.user_code.references import folder_name, names_tasks
from mamlctl.data.sets.registry import absolute_data_set, is_image_folder
from mamlctl.data.tasks.episodes import Placement, StreamSettings
from mamlctl.data.user_tasks.code import open_tasks
from mamlctl.data.user_tasks.form import TaskForm
from mamlctl.data.user_tasks.stream import UserStream

LINES = """
import numpy as np


class Tasks:
    def __init__(self):
        self.buffer = np.empty((6, 2))

    def task(self, split, number, *, seed=0):
        rng = np.random.default_rng([number, seed, ["train", "val", "test"].index(split)])
        self.buffer[:] = rng.normal(size=(6, 2))
        y = self.buffer @ rng.normal(size=(2, 3))
        return self.buffer[:4], y[:4], self.buffer[4:], y[4:]
"""


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "tasks.py").write_text(LINES)
    return open_tasks(f"{tmp_path}/tasks.py:Tasks")


def stream(tasks, split="train", seed=0, dtype=torch.float32):
    place = Placement(torch.device("cpu"), dtype)
    return UserStream(tasks, StreamSettings(split, seed, 4, 2, place))


@pytest.mark.parametrize(
    ("name", "is_code"),
    [
        ("tasks.py:Tasks", True),
        ("/home/me/tasks.py:Tasks", True),
        ("package.module:Tasks", True),
        ("omniglot", False),
        ("./a:b", False),
        ("tasks.py:", False),
        ("omniglot:5", False),
        ("table.csv", False),
    ],
)
def test_names_of_code_are_distinguished_from_paths(name, is_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_tasks(name) == is_code
    assert named_code({"dataset": name}) == ({"dataset": name} if is_code else {})
    assert not (is_code and is_image_folder(name))
    if name == "tasks.py:Tasks":
        assert absolute_data_set(name) == f"{tmp_path}/tasks.py:Tasks"
        assert folder_name(name) == "tasks.py-Tasks"


def test_a_stream_has_the_tasks_of_the_code(lines):
    assert lines.takes_seed and lines.form == TaskForm((2,), 4, 2, 1, (3,))
    assert lines.form.settings == {"task_type": "regression", "shots": 4, "queries": 2}
    episodes = stream(lines, "val", seed=3, dtype=torch.float64).episodes(7, 5)
    for place in range(5):
        rng = np.random.default_rng([7 + place, 3, 1])
        x = rng.normal(size=(6, 2))
        y = x @ rng.normal(size=(2, 3))
        for made, expected in zip(episodes.sets, (x[:4], y[:4], x[4:], y[4:]), strict=True):
            assert made.dtype == torch.float64 and np.array_equal(made[place], expected)
    alone = stream(lines, "val", seed=3, dtype=torch.float64).episodes(9, 1)
    assert all(torch.equal(one[2:3], other) for one, other in zip(episodes.sets, alone.sets, strict=True))


def test_the_digest_depends_on_the_code_and_on_what_it_reads(tmp_path):
    digests = set()
    for number in range(3):
        (tmp_path / "factor").write_text(str([1, 1, 2][number]))
        factor = f"np.loadtxt({str(tmp_path / 'factor')!r})"
        text = LINES.replace("y = ", f"y = {factor} * ") + "# changed\n" * (number == 1)
        (tmp_path / "tasks.py").write_text(text)
        digests.add(open_tasks(f"{tmp_path}/tasks.py:Tasks").digest)
    assert len(digests) == 3


def test_the_digest_ignores_the_last_bits(tmp_path):
    """A sine may differ in its last bit on another machine."""
    (tmp_path / "tasks.py").write_text(LINES)
    tasks = open_tasks(f"{tmp_path}/tasks.py:Tasks")
    stored, samples = tasks.stored, dict(tasks.samples)
    before = tasks.digest
    del tasks.__dict__["digest"]
    for key, arrays in samples.items():
        tasks.samples[key] = tuple(np.nextafter(array, np.inf) for array in arrays)
    assert tasks.digest == before and tasks.stored == stored
    del tasks.__dict__["digest"]
    for key, arrays in samples.items():
        tasks.samples[key] = tuple(array * 1.001 for array in arrays)
    assert tasks.digest != before


LABELS = np.array([0, 1, 0, 1])
POINTS = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            (POINTS, LABELS, POINTS, np.array([0, 1, 2, 0])),
            "query_y of it has the label 2, but there are 2 classes",
        ),
        ((POINTS, LABELS, POINTS, np.array([0, -1, 1, 0])), "query_y of it has the label -1"),
        ((POINTS, np.array([0, 1, 1, 1]), POINTS, LABELS), "has label 0 1 times, but 1 3 times"),
        (
            (POINTS, LABELS, POINTS[:3], LABELS[:3]),
            "query_x of it has 3 examples, which 2 classes do not divide",
        ),
        ((POINTS, LABELS, POINTS, LABELS[:3]), "query_y of it has the shape (3,), not (4,)"),
        ((POINTS, LABELS, POINTS[:, :2], LABELS), "query_x of it has the shape (4, 2), not (4, 3)"),
        (
            (POINTS, LABELS, POINTS, LABELS * 1.0),
            "query_y of it has the dtype float64, but others are integers",
        ),
        ((POINTS, LABELS * 14 + 3, POINTS, LABELS), "support_y of it has the labels 3, 17"),
        ((POINTS, LABELS - 1, POINTS, LABELS), "support_y of it has the labels -1, 0"),
        ((POINTS, LABELS * 0, POINTS, LABELS), "support_y of it has integers of one class"),
        ((POINTS[:, 0], LABELS, POINTS, LABELS), "support_x of it has the shape (4,)"),
        ((POINTS, np.zeros((4, 1, 1)), POINTS, LABELS), "support_y of it has the shape (4, 1, 1)"),
    ],
)
def test_tasks_of_another_form_are_refused(arrays, words):
    with pytest.raises(SettingsError) as error:
        form = TaskForm.of(arrays, "it")
        form.check(arrays, "it")
        assert not form.has_valid([array[None] for array in arrays])
        form.check_values(arrays, "it")
    assert words in error.value.message


def test_images_vectors_and_several_targets_have_a_form():
    images = np.zeros((4, 3, 8, 9), np.uint8)
    form = TaskForm.of((images, LABELS, images[:2], LABELS[:2]), "it")
    assert form.settings == {"ways": 2, "task_type": "classification", "shots": 2, "queries": 1}
    assert form.example_shape == (3, 8, 9) and form.defaults == {}
    form = TaskForm.of((POINTS, POINTS, POINTS, POINTS), "it")
    assert (form.ways, form.targets, form.defaults) == (1, 3, {"net": "mlp"})

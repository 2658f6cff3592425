"""Runs on tasks that the user's own code makes: checked, trained, resumed, tested and compared."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.own_code import (
    assert_another_user_has_to_trust,
    is_refused,
    same_training,
    stored_tensors,
    train_as_another_user,
)
from helpers.pages import DOCS, code_blocks

from mamlctl.core.user_code.stored import StoredCode, read_code, write_code
from mamlctl.run_folder import open_run

# The built-in family, written with numpy alone: the same random words, in the same order.
SINUSOID = """
import numpy as np

SPLITS = ("train", "val", "test")


class Tasks:
    def task(self, split, number, seed):
        key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)
        counter = np.array([0, number, 0, 0], dtype=np.uint64)
        words = np.random.Philox(counter=counter, key=key).random_raw(2 + 2 * 10)
        uniform = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        amplitude = 0.1 + (5.0 - 0.1) * uniform[0]
        phase = 0.0 + (np.pi - 0.0) * uniform[1]
        x = np.concatenate([-5.0 + 10.0 * uniform[2::2][:5], -5.0 + 10.0 * uniform[3::2]])
        y = amplitude * np.sin(x - phase)
        return x[:5, None], y[:5], x[5:, None], y[5:]
"""
BLOBS = """
import numpy as np
from spread import SPREAD


class Blobs:
    def task(self, split, number):
        rng = np.random.default_rng([number, ("train", "val", "test").index(split)])
        means = rng.normal(size=(3, 6))
        y, query_y = np.arange(3).repeat(2)[::-1], rng.integers(3, size=9)
        noise = SPREAD * rng.normal(size=(15, 6))
        return means[y] + noise[:6], y, means[query_y] + noise[6:], query_y


def make():
    return Blobs()
"""
PICTURES = """
import torch
from blobs import Blobs


class Pictures(Blobs):
    def task(self, split, number):
        x, y, query_x, query_y = (torch.tensor(part.copy()) for part in super().task(split, number))
        x, query_x = (part[:, None, :, None].expand(-1, 3, -1, 6).repeat(1, 1, 3, 3) for part in (x, query_x))
        return x, y.to(torch.int32), query_x.half(), query_y.to(torch.uint8)


pictures = Pictures()
"""
SPREAD = "SPREAD = 0.3\n"
SHORT = ("--meta-batch-size", "4", "--epochs", "2", "--steps-per-epoch", "3", "--val-tasks", "6")
SHORT = (*SHORT, "--inner-steps", "2", "--device", "cpu", "--quiet")


@pytest.fixture
def here(here):
    """The same folder, with code."""
    (here / "sines.py").write_text(SINUSOID)
    (here / "blobs.py").write_text(BLOBS)
    (here / "pictures.py").write_text(PICTURES)
    (here / "spread.py").write_text(SPREAD)
    return here


@pytest.mark.parametrize("engine", ["compiled", "plain"])
def test_a_copy_of_the_sinusoid_trains_bitwise_as_the_built_in_one(engine, here, cli):
    words = ("train", *SHORT, "--seed", "5", "--eval-seed", "6", "--engine", engine)
    assert cli(*words, "--dataset", "sinusoid", "--shots", "5", "--out", "built-in")[0] == 0
    code, _, err = cli(*words, "--dataset", "sines.py:Tasks", "--out", "own")
    assert code == 0, err
    assert same_training(here / "built-in", here / "own")
    answers = [cli("eval", run, "--tasks", "7", "--json", "--quiet") for run in ("built-in", "own")]
    assert [code for code, *_ in answers] == [0, 0]
    built_in, own = (json.loads(out)["results"] for _, out, _ in answers)
    assert own == built_in
    assert cli(*words, "--dataset", "sines.py:Tasks", "--train-seed", "8", "--out", "third")[0] == 0
    assert not same_training(here / "own", here / "third")


@pytest.mark.parametrize("name", ["blobs.py:Blobs", "blobs.py:make", "pictures.py:pictures"])
def test_integer_labels_mean_classification(name, here, cli):
    is_picture = name.startswith("pictures")
    more = ("--filters", "4") if is_picture else ()
    words = ("train", "--dataset", name, *SHORT, *more, "--inner-lr", "0.05", "--out", "run")
    code, out, err = cli(*words, "--json")
    assert code == 0 and "best_val_accuracy" in json.loads(out)["result"], err
    config = open_run(here / "run").config
    assert (config.ways, config.shots, config.queries, config.task_type) == (3, 2, 3, "classification")
    assert config.net == ("conv4" if is_picture else "mlp") and config.algo == "maml++"
    code, out, err = cli("eval", "run", "--tasks", "40", "--json", "--label-permutations", "2", "--quiet")
    assert code == 0, err
    (best, _) = json.loads(out)["results"]
    assert (best["ways"], best["shots"], best["queries"]) == (3, 2, 3) and best["accuracy"] > 0.5


def test_several_targets_from_images_with_an_own_network(here, cli):
    (here / "net.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs):\n"
        "    body = nn.Conv2d(shape[0], 2, 3), nn.Tanh(), nn.Flatten()\n"
        "    return nn.Sequential(*body, nn.Linear(32, outputs))\n"
    )
    (here / "both.py").write_text(
        "import numpy as np\n"
        "def both():\n"
        "    class Tasks:\n"
        "        def task(self, split, number):\n"
        "            x = np.random.default_rng([number, len(split)]).normal(size=(9, 1, 6, 6))\n"
        "            y = np.stack([x.sum((1, 2, 3)), x[:, 0, 0, 0]], 1).astype(np.float32)\n"
        "            return x[:5], y[:5], x[5:], y[5:]\n"
        "    return Tasks()\n"
    )
    for net in ("net.py:make", "mlp"):
        code, _, err = cli(
            "train", "--dataset", "both.py:both", "--net", net, *SHORT, "--out", f"run-{net[:3]}"
        )
        assert code == 0, err
        answer = cli("eval", f"run-{net[:3]}", "--tasks", "4", "--plot", "--json", "--quiet")
        assert answer[0] == 0 and json.loads(answer[1])["results"][0]["mse"] > 0
    one, other = (stored_tensors(here / f"run-{net}")["linear.weight"].shape for net in ("net", "mlp"))
    assert (one, other) == ((2, 32), (2, 40))


def code_that(body, before="", name="task(self, split, number)"):
    indented = "\n".join(f"        {line}" for line in body.splitlines())
    return f"import numpy as np\n{before}\n\nclass Tasks:\n    def {name}:\n{indented}\n"


GOOD = "return x[:4], y[:4], x[4:], y[4:]"
DRAWN = "x = np.random.default_rng([number, len(split)]).normal(size=(6, 2))\ny = x.sum(1)\n"
BAD = {
    "another task each time": (
        code_that(f"x = np.random.normal(size=(6, 2))\ny = x.sum(1)\n{GOOD}"),
        (
            "task('train', 0) of tasks.py:Tasks gives another task when it is called again",
            "both of them seed",
        ),
    ),
    "the order of calls": (
        code_that(
            f"if number: self.__class__.last = number\n{DRAWN}x = x + self.last\n{GOOD}",
            name="task(self, split, number)",
        ).replace("class Tasks:\n", "class Tasks:\n    last = 0\n"),
        ("gives another task when it is called again",),
    ),
    "the hash of a string": (
        code_that(
            f"x = np.random.default_rng([number, abs(hash(split))]).normal(size=(6, 2))\ny = x.sum(1)\n{GOOD}"
        ),
        ("task('train', 0) of tasks.py:Tasks gives another task in a new process",),
    ),
    "a file beside the code": (
        code_that(f"{DRAWN}y = y * FACTOR\n{GOOD}", "FACTOR = np.loadtxt(__file__[:-8] + 'factor.txt')\n"),
        ("not from a copy of its code in a new process", "FileNotFoundError", "by an absolute path"),
    ),
    "a number that is not finite": (
        code_that(f"{DRAWN}y[5] = np.nan if split == 'test' else 0\n{GOOD}"),
        ("query_y of task('test', 0) of tasks.py:Tasks has numbers that are not finite",),
    ),
    "too large for float32": (
        code_that(f"{DRAWN}y = y * 10.0 ** (100 if number > 20 else 0)\n{GOOD}"),
        ("support_y of task('train', 23) of tasks.py:Tasks has numbers that are not finite",),
    ),
    "a masked array": (
        code_that(f"{DRAWN}y = np.ma.masked_less(y, 0)\n{GOOD}"),
        ("support_y of task('train', 0) of tasks.py:Tasks is a masked array", "fill in the numbers"),
    ),
    "three arrays": (
        code_that(f"{DRAWN}return x, y, x"),
        ("task('train', 0) of tasks.py:Tasks returned 3 values", "support_x, support_y, query_x, query_y"),
    ),
    "a list": (
        code_that(f"{DRAWN}return x, list(y), x, y"),
        ("support_y of task('train', 0) of tasks.py:Tasks has the type list",),
    ),
    "truth values as targets": (
        code_that(f"{DRAWN}return x, y > 0, x, y > 0"),
        ("support_y of task('train', 0) of tasks.py:Tasks has the dtype bool",),
    ),
    "another size": (
        code_that(
            f"{DRAWN}cut = 4 - (split == 'val' and number == 1)\nreturn x[:cut], y[:cut], x[cut:], y[cut:]"
        ),
        ("support_x of task('val', 1) of tasks.py:Tasks has the shape (3, 2), not (4, 2)", "same shapes"),
    ),
    "a finite set": (
        code_that(f"x = [np.ones((6, 2)) for _ in range(20)][number]\ny = x.sum(1)\n{GOOD}"),
        ("task('train', 23) failed: ", "tasks.py, line 6, in task: IndexError: list index out of range"),
    ),
    "an exception": (
        code_that("raise ValueError('no such split')"),
        ("task('train', 0) failed: ", "tasks.py, line 6, in task: ValueError: no such split"),
    ),
    "an exception in the constructor": (
        code_that(f"{DRAWN}{GOOD}") + "    def __init__(self):\n        1 / 0\n",
        ("tasks.py, line 10, in __init__: ZeroDivisionError",),
    ),
    "no method": ("class Tasks:\n    pass\n", ("tasks.py:Tasks has no method task(split, number)",)),
    "other parameters": (
        code_that("pass", name="task(self, number)"),
        ("the method of tasks.py:Tasks is task(number), but it is called as task(split, number)",),
    ),
}


@pytest.mark.parametrize("how", list(BAD))
def test_code_that_does_not_make_such_tasks_is_refused_at_the_start(how, here, cli):
    text, words = BAD[how]
    (here / "tasks.py").write_text(text)
    (here / "factor.txt").write_text("2")
    assert is_refused(cli("train", "--dataset", "tasks.py:Tasks", *SHORT, "--out", "run"), *words)
    assert not (here / "run").exists()


def test_code_that_changes_settings_of_torch_is_refused_at_the_start(here, cli):
    (here / "tasks.py").write_text(
        code_that(f"torch.set_default_dtype(torch.float64)\n{DRAWN}{GOOD}", "import torch")
    )
    try:
        code, _, err = cli("train", "--dataset", "tasks.py:Tasks", *SHORT, "--out", "run")
    finally:
        torch.set_default_dtype(torch.float32)
    assert code == 2 and "tasks.py:Tasks changes torch's default dtype" in err and not Path("run").exists()


def test_targets_that_look_like_labels_are_noticed(here, cli):
    (here / "tasks.py").write_text(code_that(f"{DRAWN}y = np.longdouble(y > 0)\n{GOOD}"))
    code, _, err = cli("train", "--dataset", "tasks.py:Tasks", *SHORT[:-1], "--out", "run")
    assert code == 0 and "are whole numbers of type float64, so this is regression" in " ".join(err.split())


def test_given_sizes_that_differ_are_refused_with_both_numbers(here, cli):
    words = ("train", "--dataset", "blobs.py:Blobs", *SHORT, "--out", "run")
    assert is_refused(cli(*words, "--ways", "5"), "--ways is 5, but it is 3 in the tasks of blobs.py:Blobs")
    assert is_refused(cli(*words, "--queries", "2"), "--queries is 2, but it is 3")
    assert is_refused(cli(*words, "--task-type", "regression", "--algo", "maml"), "but it is classification")
    assert is_refused(cli(*words, "--eval-seed", "2"), "the method task of blobs.py:Blobs takes no seed")
    assert is_refused(cli(*words, "--train-shots", "2"), "--train-shots has no meaning")
    assert is_refused(cli(*words, "--image-size", "28"), "--image-size has no meaning")
    assert is_refused(cli(*words, "--net", "conv4"), "needs images, but examples", "(6,)")
    assert is_refused(
        cli(*words, "--algo", "transfer", "--inner-steps", "0"),
        "--algo transfer needs classes that tasks share",
    )
    assert is_refused(cli("train", "--dataset", "sinusoid", "--task-type", "regression"), "has no meaning")
    assert is_refused(cli("train", "--dataset", "blobs.py", *SHORT), "without a class", "blobs.py:Tasks")
    assert is_refused(cli("train", "--dataset", "blobs.py:Blob", *SHORT), "has no 'Blob'", "'Blobs'")
    assert not (here / "run").exists()
    assert cli(*words, "--ways", "3", "--shots", "2", "--queries", "3")[0] == 0


@pytest.fixture(scope="module")
def folder_of_run(tmp_path_factory):
    """A folder with a run on blobs, and the list of the user who trained it."""
    folder = tmp_path_factory.mktemp("blobs")
    (folder / "blobs.py").write_text(BLOBS)
    (folder / "spread.py").write_text(SPREAD)
    words = ("--dataset", f"{folder}/blobs.py:Blobs", *SHORT)
    train_as_another_user(folder, *words, "--out", folder / "run")
    (folder / "blobs.py").unlink()
    (folder / "spread.py").write_text("raise SystemExit('the original was used')\n")
    return folder


@pytest.fixture
def trained(folder_of_run, here):
    """A copy of that run."""
    shutil.copytree(folder_of_run, here, dirs_exist_ok=True)
    return here / "run"


def test_evaluations_have_the_sizes_of_the_tasks(trained, cli):
    name = open_run(trained).config.dataset
    assert is_refused(
        cli("eval", trained, "--shots", "5"), f"--shots is 5, but it is 2 in the tasks of {name}"
    )
    assert is_refused(cli("eval", trained, "--queries", "5"), "--queries is 5, but it is 3")
    assert is_refused(cli("eval", trained, "--disjoint"), "--disjoint is for images")
    assert is_refused(cli("eval", trained, "--eval-seed", "3"), "takes no seed")
    assert is_refused(cli("eval", trained, "--dataset", "sinusoid"), "was trained on the tasks of its code")
    assert is_refused(
        cli("eval", trained, "--dataset", "other.py:Tasks"), "is other code than that of the run"
    )
    assert is_refused(cli("eval", trained, "--support", "a", "--query", "b"), "was trained on the tasks of")
    assert is_refused(cli("fetch", "tasks.py:Tasks"), "nothing to fetch")
    assert cli("eval", trained, "--shots", "2", "--queries", "3", "--tasks", "6", "--quiet")[0] == 0


def test_the_copy_of_the_code_is_used_after_the_original_is_gone(trained, cli, here, monkeypatch):
    code = read_code(trained / "code" / "tasks")
    assert code.files == {"blobs.py": BLOBS.encode(), "spread.py": SPREAD.encode()}
    assert cli("eval", trained, "--tasks", "6", "--quiet", "--plot")[0] == 0
    assert_another_user_has_to_trust(cli, monkeypatch, trained, "--tasks", "6", trusting="compare")


def test_a_resumed_run_is_bitwise_that_without_an_interruption(here, cli):
    words = ("train", *SHORT, "--dataset", "blobs.py:Blobs")
    assert cli(*words, "--out", "whole")[0] == 0
    assert cli(*words, "--out", "parts", "--time-limit", "0.001s")[0] == 0
    assert open_run(here / "parts").state().step < 6
    (here / "blobs.py").unlink()
    while open_run(here / "parts").state().status != "finished":
        assert cli("train", "--resume", "parts", "--time-limit", "0.001s", "--quiet")[0] == 0
    assert same_training(here / "whole", here / "parts")


def test_an_exception_in_training_keeps_the_meta_steps_before_it(here, cli):
    """Task 18 belongs to the fifth of six meta-steps, and needs a file that is there only later."""
    lines = [f"if split == 'train' and number == 18: open({str(here / 'later')!r}, 'rb').close()"]
    (here / "tasks.py").write_text(code_that(f"{lines[0]}\n{DRAWN}{GOOD}"))
    words = ("train", *SHORT, "--dataset", "tasks.py:Tasks", "--engine", "plain")
    answer = cli(*words, "--out", "run")
    assert is_refused(answer, "task('train', 18) failed: ", "tasks.py, line 6, in task: FileNotFoundError")
    state = open_run(here / "run").state()
    assert (state.status, state.step) == ("failed", 4) and "FileNotFoundError" in state.reason
    (here / "later").touch()
    code, _, err = cli("train", "--resume", "run", "--report-every", "1")
    assert code == 0 and "step 5/6" in err and "step 4/6" not in err
    assert cli(*words, "--out", "whole")[0] == 0
    assert same_training(here / "run", here / "whole")


def test_tasks_that_read_other_data_now_are_refused(here, cli):
    np.savez(here / "data.npz", factor=2.0)
    loaded = f"FACTOR = np.load({str(here / 'data.npz')!r})['factor']\n"
    (here / "tasks.py").write_text(code_that(f"{DRAWN}y = FACTOR * y\n{GOOD}", loaded))
    assert cli("train", *SHORT, "--dataset", "tasks.py:Tasks", "--out", "run")[0] == 0
    assert cli("eval", "run", "--tasks", "4", "--quiet")[0] == 0
    np.savez(here / "data.npz", factor=3.0)
    for words in (("eval", "run", "--tasks", "4"), ("train", "--resume", "run")):
        code, _, err = cli(*words)
        assert code == 3 and "error: the tasks of run " in err and "restore what its code reads" in err


EVIL = "from pathlib import Path\nPath('ran').touch()\n"


def forge_code(run):
    """Other code, described consistently."""
    folder = run / "code" / "tasks"
    code = read_code(folder)
    files = dict(code.files) | {"spread.py": EVIL.encode() + code.files["spread.py"]}
    write_code(folder, StoredCode(code.entry, code.name, code.installed, files))


def forge_name(run, name):
    """Another --dataset in config.yaml."""
    path = run / "config.yaml"
    path.write_text(re.sub("^dataset: .*$", f"dataset: '{name}'", path.read_text(), flags=re.MULTILINE))


def evil_file(run):
    (run / "evil.py").write_text(EVIL + BLOBS.replace("from spread import SPREAD", "SPREAD = 1.0"))
    forge_name(run, f"{run}/evil.py:Blobs")


HOSTILE = {
    "the code": forge_code,
    "a file beside": lambda run: (run / "code" / "tasks" / "numpy.py").write_text(EVIL),
    "config.yaml names a function": lambda run: (shutil.rmtree(run / "code"), forge_name(run, "os:system")),
    "config.yaml names a file": lambda run: (shutil.rmtree(run / "code"), evil_file(run)),
    "an installed module": lambda run: (
        shutil.rmtree(run / "code"),
        forge_name(run, "subprocess:call"),
        write_code(run / "code" / "tasks", StoredCode("subprocess", "call", True, {"subprocess.py": b""})),
    ),
}


@pytest.mark.parametrize("how", list(HOSTILE))
def test_no_command_runs_the_code_of_a_hostile_run_folder(how, trained, cli, here):
    shutil.copytree(trained, here / "other")
    HOSTILE[how](trained)
    for words in (
        ("eval", trained, "--tasks", "4"),
        ("eval", trained, "--tasks", "4", "--plot"),
        ("train", "--resume", trained),
        ("compare", here / "other", trained, "--tasks", "4"),
        ("train", "--config", trained / "config.yaml", "--out", "new"),
    ):
        code, _, err = cli(*words)
        assert code == 2 and "error: " in err, (words, err)
    assert cli("compare", "--list")[0] == 0
    assert not (here / "ran").exists() and not (here / "other" / "eval").exists()


@pytest.mark.process
def test_runs_on_the_same_tasks_are_compared(here, cli):
    shutil.copytree(here, here / "copy", ignore=shutil.ignore_patterns("copy"))
    for name, words in {
        "one": ("blobs.py:Blobs",),
        "two": ("copy/blobs.py:Blobs", "--algo", "maml"),
    }.items():
        assert cli("train", "--dataset", *words, *SHORT, "--out", name)[0] == 0
    code, out, err = cli("compare", "one", "two", "--tasks", "6", "--quiet", "--csv")
    assert code == 0, err
    assert out.count("\n") == 3
    (here / "spread.py").write_text("SPREAD = 0.4\n")
    assert cli("train", "--dataset", "blobs.py:Blobs", *SHORT, "--out", "three")[0] == 0
    assert is_refused(cli("compare", "one", "three", "--tasks", "6", "--quiet"), "was trained on data")


@pytest.mark.process
def test_a_grid_on_own_tasks(here, cli):
    words = ("ablate", "--dataset", "blobs.py:Blobs", "--grid", "inner_lr=0.1,0.4", "--seeds", "1", *SHORT)
    words = (*words, "--tasks", "6")
    code, out, err = cli(*words, "--print-commands")
    assert code == 0 and out.count("--task-type classification") == 2, err
    assert cli(*words, "--dry-run")[0] == 0
    code, out, err = cli(*words, "--out", "grid")
    assert code == 0 and "inner_lr=0.4" in out, err
    (here / "spread.py").write_text("SPREAD = 0.4\n")
    shutil.rmtree(here / "grid" / "cells" / "inner_lr=0.4-s0")
    assert is_refused(cli(*words, "--out", "grid"), "was trained with another version of blobs.py:Blobs")


def test_the_code_in_the_docs_works(here, cli):
    """The page's own file and commands, with fewer meta-steps."""
    section = (DOCS / "your-own.md").read_text().split("\n## Your own tasks\n")[1].split("\n## ")[0]
    (file,) = code_blocks(section, "python")
    (here / "tasks.py").write_text(file)
    commands = [line.split()[1:] for line in code_blocks(section)[1].splitlines()]
    assert [words[0] for words in commands] == ["train", "eval"]
    for words in commands:
        fewer = ["--steps-per-epoch", "2", "--val-tasks", "4"] if words[0] == "train" else ["--tasks", "4"]
        code, _, err = cli(*words, *fewer)
        assert code == 0, err
    assert (here / "runs" / "waves" / "plots" / "regression.png").exists()

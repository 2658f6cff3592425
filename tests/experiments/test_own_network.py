"""Runs with the user's own network are resumed, tested, compared and saved from the copy of its code."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.own_code import (
    EVIL,
    assert_another_user_has_to_trust,
    forge_code,
    forge_setting,
    is_refused,
    same_training,
    train_as_another_user,
    with_data_root,
)
from helpers.pages import DOCS, code_blocks
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.user_code.stored import StoredCode, read_code, trust_file, write_code
from mamlctl.data.sets import glyphs
from mamlctl.engine.training import run_code
from mamlctl.run_folder import open_run

NET = """
import torch
from layers import Body


class Net(torch.nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.body = Body(shape[0])
        self.fc = torch.nn.Linear(4 * 7 * 7, outputs)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


def make(shape, outputs):
    return Net(shape, outputs)
"""
LAYERS = """
from torch import nn


class Body(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(DROP))
"""
LOSS = """
def loss(outputs, targets):
    return outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]
"""
SMALL = """
--dataset glyphs --ways 3 --inner-steps 2 --meta-batch-size 2 --epochs 2 --steps-per-epoch 3 --val-tasks 4
--device cpu --quiet
"""


def write_net(folder, drop=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "layers.py").write_text(
        LAYERS.replace("nn.Dropout(DROP)", f"nn.Dropout({drop})" if drop else "nn.Identity()")
    )
    return folder / "net.py"


@pytest.fixture
def cli(cli, glyphs_root):
    """The same function; the commands that need a data root get one."""
    return with_data_root(cli, glyphs_root)


@pytest.fixture
def trained(here, cli):
    """A function that trains a run in `here` and then removes the original files."""

    def run(*words, name="run", drop=0.0):
        write_net(here / "code", drop)
        code, _, err = cli("train", *SMALL.split(), "--net", "code/net.py:make", "--out", name, *words)
        assert code == 0, err
        shutil.rmtree(here / "code")
        return here / name

    return run


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_resumed_run_is_bitwise_that_without_an_interruption(drop, here, cli):
    write_net(here / "code", drop)
    words = ("train", *SMALL.split(), "--net", "code/net.py:make", "--algo", "maml++")
    assert cli(*words, "--out", "whole")[0] == 0
    assert cli(*words, "--out", "parts", "--time-limit", "0.001s")[0] == 0
    assert open_run(here / "parts").state().step < 6
    shutil.rmtree(here / "code")
    while open_run(here / "parts").state().status != "finished":
        assert cli("train", "--resume", "parts", "--time-limit", "0.001s", "--quiet")[0] == 0
    assert same_training(here / "whole", here / "parts")
    plan = json.loads((here / "parts" / "net.json").read_text())
    assert plan["random"] == (drop > 0) and plan["one_pass"] == (drop == 0)


def test_the_copy_of_the_code_is_used_after_the_original_is_gone(trained, cli, here, monkeypatch):
    run = trained()
    code = read_code(run / "code" / "net")
    assert code.files == {
        "net.py": NET.encode(),
        "layers.py": LAYERS.replace("nn.Dropout(DROP)", "nn.Identity()").encode(),
    }
    write_net(here / "code")
    (here / "code" / "layers.py").write_text("raise SystemExit('the original was used')\n")
    assert cli("eval", run, "--tasks", "4", "--quiet")[0] == 0
    assert_another_user_has_to_trust(cli, monkeypatch, run, "--tasks", "4")


def forge_all(run, net, code):
    """Another --net in config.yaml, and code that is described consistently."""
    forge_setting(run, "net", net)
    shutil.rmtree(run / "code" / "net")
    write_code(run / "code" / "net", code)


HOSTILE = {
    "the code": lambda run: forge_code(run, "net", "layers.py"),
    "the loss": lambda run: forge_code(run, "loss", "loss.py"),
    "config.yaml names a function": lambda run: (
        shutil.rmtree(run / "code"),
        forge_setting(run, "net", "os:system"),
    ),
    "config.yaml names a function as the loss": lambda run: (
        shutil.rmtree(run / "code" / "loss"),
        forge_setting(run, "loss", "os:system"),
    ),
    "config.yaml names a file": lambda run: (
        (run / "evil.py").write_text(EVIL + NET),
        shutil.rmtree(run / "code"),
        forge_setting(run, "net", f"{run}/evil.py:make"),
    ),
    "config.yaml names a file as the loss": lambda run: (
        (run / "evil.py").write_text(EVIL + LOSS),
        shutil.rmtree(run / "code" / "loss"),
        forge_setting(run, "loss", f"{run}/evil.py:loss"),
    ),
    "an installed module": lambda run: forge_all(
        run, "subprocess:call", StoredCode("subprocess", "call", True, {"subprocess.py": b""})
    ),
    "the loss is the network": lambda run: (
        shutil.rmtree(run / "code" / "loss"),
        shutil.copytree(run / "code" / "net", run / "code" / "loss"),
        (run / "code" / "loss" / "net.py").write_text(EVIL + NET),
    ),
    "a file beside": lambda run: (run / "code" / "net" / "torch.py").write_text(EVIL),
    "a file beside the loss": lambda run: (run / "code" / "loss" / "torch.py").write_text(EVIL),
    "net.json": lambda run: (run / "net.json").write_text('{"format": 1, "one_pass": "os:system"}'),
}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, glyphs_root):
    """A folder with two runs of an own network and loss, and the list of the user who trained them."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("run", "other"):
        words = ["--net", f"{write_net(folder / 'code')}:make", "--out", folder / name]
        (folder / "code" / "loss.py").write_text(LOSS)
        words += ["--loss", f"{folder / 'code' / 'loss.py'}:loss"]
        train_as_another_user(folder, *SMALL.split(), *words, "--data-root", glyphs_root)
    shutil.rmtree(folder / "code")
    return folder


@pytest.mark.parametrize("how", list(HOSTILE))
def test_no_command_runs_the_code_of_a_hostile_run_folder(how, two_runs, cli, here):
    shutil.copytree(two_runs, here, dirs_exist_ok=True)
    run, other = here / "run", here / "other"
    HOSTILE[how](run)
    (here / "learn" / "a").mkdir(parents=True)
    for words in (
        ("eval", run, "--tasks", "4"),
        ("eval", run, "--tasks", "4", "--plot"),
        ("eval", run, "--support", here / "learn", "--save-adapted", here / "mine.pt"),
        ("train", "--resume", run),
        ("compare", other, run, "--tasks", "4", "--data-root", "data"),
    ):
        code, _, err = cli(*words)
        assert code == 2 and "error: " in err, (words, err)
    assert not (here / "ran").exists()
    assert not (other / "eval").exists() or how == "net.json"  # refused before the first test


def test_code_that_only_a_file_of_settings_names_is_not_run(trained, cli, here):
    run = trained()
    write_net(here / "code")
    (here / "code" / "net.py").write_text(EVIL + NET)
    words = ("train", "--config", run / "config.yaml", "--out", "other", "--quiet")
    assert is_refused(cli(*words), "names code")
    assert not (here / "ran").exists()
    assert cli(*words, "--trust-code")[0] == 0 and (here / "ran").exists()


def test_own_images_are_classified_and_the_module_is_saved(trained, cli, here, glyphs_root):
    run = trained(drop=0.3)
    packed = glyphs.open_pack(glyphs_root, on_event=ignore)
    for label, name in enumerate(("ant", "bee", "cow")):
        for shot in range(2):
            folder = here / ("learn" if shot else "ask") / name
            folder.mkdir(parents=True)
            Image.fromarray(packed.images_MCHW[packed.starts[label] + shot, 0]).save(folder / "x.png")
    code, out, err = cli(
        "eval", run, "--support", "learn", "--query", "ask", "--save-adapted", "mine.pt", "--json"
    )
    assert code == 0, err
    saved = torch.load(here / "mine.pt", weights_only=True)
    names: dict = {}
    exec(LAYERS.replace("nn.Dropout(DROP)", "nn.Dropout(0.3)"), names)
    exec(NET.replace("from layers import Body", ""), names)
    module = names["make"]((1, 28, 28), 3)
    module.load_state_dict(saved["weights"])
    x = np.stack([np.array(Image.open(file)) for file in sorted((here / "ask").rglob("*.png"))])
    with torch.no_grad():
        scores = module.eval()(1 - torch.from_numpy(x).unsqueeze(1) / 255)
    expected = [list(image["probabilities"].values()) for image in json.loads(out)["predictions"]]
    assert np.allclose(scores.softmax(1), expected, atol=2e-5)


def test_the_code_in_the_docs_works(here, cli, glyphs_root, monkeypatch):
    """The page's own file and commands, with fewer meta-steps; `mine.pt` predicts as `mamlctl eval` does."""
    page = (DOCS / "your-own.md").read_text()
    file, use = (block for block in code_blocks(page, "python") if "net" in block.split("\n\n")[0])
    (here / "net.py").write_text(file)
    packed = glyphs.open_pack(glyphs_root, on_event=ignore)
    for label in range(5):
        (here / "learn" / str(label)).mkdir(parents=True)
        image = Image.fromarray(packed.images_MCHW[packed.starts[label], 0])
        image.save(here / "learn" / str(label) / "x.png")
    lines = "".join(code_blocks(page)).replace("\\\n", "").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("mamlctl") and "runs/rows" in line]
    assert [words[0] for words in commands] == ["train", "eval", "eval"]
    fewer = {"train": ["--steps-per-epoch", "2", "--val-tasks", "4"], "eval": ["--query", "learn", "--json"]}
    for words in commands:
        more = ["--tasks", "4"] if "--tasks" in words else fewer[words[0]]
        code, out, err = cli(*words, *more)
        assert code == 0, err
    assert "Rows with 12 tensors, head 'head': all tasks in one pass" in page
    monkeypatch.syspath_prepend(here)
    names: dict = {}
    exec(use, names)
    del sys.modules["net"]
    x = np.stack([np.array(Image.open(file)) for file in sorted((here / "learn").rglob("*.png"))])
    with torch.no_grad():
        scores = names["module"](1 - torch.from_numpy(x).unsqueeze(1) / 255)
    expected = [list(image["probabilities"].values()) for image in json.loads(out)["predictions"]]
    assert np.allclose(scores.softmax(1), expected, atol=2e-5)


def test_the_notice_names_a_momentum_of_batch_norm_that_is_not_used(here):
    (here / "net.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs):\n"
        "    norm = nn.BatchNorm1d(8, momentum=0.3)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), norm, nn.Linear(8, outputs))\n"
    )
    module = run_code._checked_module(f"{here}/net.py:make", None, (1, 4, 4), 3, None)
    words = "Sequential with 4 tensors, head '3', batch norm with momentum 0.1, not 0.3"
    assert module.notice == f"{words}: all tasks in one pass"


def test_a_network_of_curves(here, cli):
    (here / "net.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs):\n"
        "    return nn.Sequential(nn.Linear(*shape, 9), nn.Tanh(), nn.Linear(9, outputs))\n"
    )
    words = "--dataset sinusoid --epochs 1 --steps-per-epoch 3 --val-tasks 4 --device cpu"
    code, _, err = cli("train", *words.split(), "--net", "net.py:make", "--out", "run")
    assert code == 0 and "Sequential with 4 tensors, head '2': all tasks in one pass" in err
    assert open_run(here / "run").config.engine == "adjoint"
    assert cli("eval", "run", "--tasks", "4", "--quiet")[0] == 0


def test_a_network_of_a_table_with_two_targets(here, cli):
    """Trained, tested, and adapted to a new task after its file is gone."""
    (here / "net.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs):\n"
        "    return nn.Sequential(nn.Linear(*shape, 9), nn.Tanh(), nn.Linear(9, outputs))\n"
    )
    draw, rows = np.random.default_rng(0), ["task,x1,x2,y1,y2"]
    for task in range(12):
        rows += [f"t{task}," + ",".join(map(str, draw.normal(size=4))) for _ in range(8)]
    (here / "tasks.csv").write_text("\n".join(rows))
    words = "--dataset tasks.csv --shots 3 --queries 3 --epochs 1 --steps-per-epoch 3 --val-tasks 4 --quiet"
    code, _, err = cli("train", *words.split(), "--net", "net.py:make", "--device", "cpu", "--out", "run")
    assert code == 0, err
    (here / "net.py").unlink()
    assert cli("eval", "run", "--tasks", "4", "--quiet")[0] == 0
    (here / "a.csv").write_text("\n".join(row.partition(",")[2] for row in rows[:7]))
    code, _, err = cli("eval", "run", "--support", "a.csv", "--query", "a.csv", "--json")
    assert code == 0, err
    trust_file().unlink()
    assert is_refused(cli("eval", "run", "--support", "a.csv", "--query", "a.csv"), "do not trust")


@pytest.mark.render
def test_the_figure_of_curves_uses_the_copy_of_the_code(here, cli):
    test_a_network_of_curves(here, cli)
    (here / "net.py").unlink()
    assert cli("eval", "run", "--tasks", "4", "--plot", "--quiet")[0] == 0
    assert read_code(here / "run/plots/pretrained/code/net") == read_code(here / "run/code/net")


PROBLEMS = {
    ("--net", "conv5"): "did you mean 'conv4'?",
    ("--net", "resnet17"): "did you mean 'resnet18'?",
    ("--net", "net.py:mak"): "did you mean 'make'?",
    ("--net", "nett.py:make"): "did you mean 'net.py'?",
    ("--net", "net.py:make", "--filters", "8"): "--filters has no effect with --net",
    ("--net", "net.py:make", "--precision", "bf16"): "only our convolutions support it",
    ("--net", "net.py:make", "--head", "body"): "'body' is a Body, not a linear layer",
    ("--net", "conv4", "--head", "fc"): "--head has no effect with --net conv4",
    ("--net", "conv4", "--trust-code"): "--trust-code has no effect",
    ("--net", "fails.py:make"): "fails.py, line 2, in make: KeyError: 3",
}


@pytest.mark.parametrize("words", list(PROBLEMS), ids=" ".join)
def test_wrong_networks_are_refused(words, here, cli):
    write_net(here)
    (here / "fails.py").write_text("def make(shape, outputs):\n    return {}[outputs]\n")
    assert is_refused(cli("train", *SMALL.split(), "--out", "run", *words), PROBLEMS[words])
    assert not (here / "run").exists()


def test_runs_of_other_code_have_rows_of_their_own(here, cli):
    for name, drop in (("one", 0.0), ("two", 0.2)):
        write_net(here / "code", drop)
        assert cli("train", *SMALL.split(), "--net", "code/net.py:make", "--out", name, "--seed", "3")[0] == 0
    code, out, err = cli("compare", "one", "two", "--tasks", "4", "--csv", "--quiet")
    assert code == 0, err
    assert out.count("code=") == 2


@pytest.mark.process
def test_the_cells_of_a_grid_use_the_file_of_the_parent(here, cli, glyphs_root):
    net = write_net(here / "code", 0.2)
    words = [
        "--net",
        "code/net.py:make",
        "--seeds",
        "1",
        "--tasks",
        "4",
        "--data-root",
        glyphs_root,
        "--out",
        "grid",
    ]
    words = ["compare", "--algos", "maml,anil", *SMALL.split(), *words]
    code, _, err = cli(*words)
    assert code == 0, err
    digests = {read_code(path).digest for path in (here / "grid" / "cells").glob("*/code/net")}
    assert len(digests) == 1 and digests.pop() in trust_file().read_text()
    assert is_refused(cli("ablate", "--resume", "grid", "--seeds", "2"), "the plan in grid names code")
    limited = ("--seeds", "2", "--trust-code", "--time-limit", "0.001s")
    assert "--trust-code" in cli("ablate", "--resume", "grid", *limited)[2]
    net.write_text(net.read_text() + "\n# changed\n")
    assert is_refused(cli(*words, "--seeds", "2"), "was trained with another version of net.py:make")

"""Runs with their own loss are resumed, tested, compared and used from the copy of its code."""

import json
import shutil

import numpy as np
import pytest
from helpers.own_code import is_refused, same_training, with_data_root
from helpers.own_tables import periodic_csv
from helpers.pages import DOCS, code_blocks
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.user_code.stored import read_code, trust_file
from mamlctl.data.sets import glyphs
from mamlctl.run_folder import open_run

LOSS = """
from constants import SPREAD


def smooth(outputs, targets):
    log_p = outputs.log_softmax(1)
    right = log_p.gather(1, targets[:, None])[:, 0]
    return -(1 - SPREAD) * right - SPREAD * log_p.mean(1)


def pinball(outputs, targets):
    error = targets - outputs
    return (0.8 * error.clamp(min=0) + 0.2 * (-error).clamp(min=0)).mean(1)


def usual(outputs, targets):
    return outputs.logsumexp(1) - outputs.gather(1, targets[:, None])[:, 0]


def squared(outputs, targets):
    return (outputs - targets).square().mean(1)
"""
SHORT = "--inner-steps 2 --meta-batch-size 2 --epochs 2 --val-tasks 4 --device cpu --quiet"
SMALL = f"--dataset glyphs --ways 3 --filters 4 --steps-per-epoch 3 {SHORT}".split()
CURVES = f"--dataset sinusoid --steps-per-epoch 4 {SHORT}".split()


@pytest.fixture
def cli(cli, glyphs_root):
    """The same function; the commands that need a data root get one."""
    return with_data_root(cli, glyphs_root)


@pytest.fixture
def here(here):
    """The same folder, with a file of losses."""
    write_losses(here / "code")
    return here


def write_losses(folder, spread=0.1):
    folder.mkdir(exist_ok=True)
    (folder / "loss.py").write_text(LOSS)
    (folder / "constants.py").write_text(f"SPREAD = {spread}\n")


def test_a_resumed_run_is_bitwise_that_without_an_interruption(here, cli, monkeypatch):
    words = ("train", *SMALL, "--loss", "code/loss.py:smooth", "--algo", "maml++")
    code, _, err = cli(*words, "--out", "whole")
    assert code == 0, err
    assert cli(*words, "--out", "parts", "--time-limit", "0.001s")[0] == 0
    shutil.rmtree(here / "code")
    with monkeypatch.context() as patch:  # the same command again, as torchrun restarts it
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert cli(*words, "--out", "parts", "--time-limit", "0.001s")[0] == 0
    while open_run(here / "parts").state().status != "finished":
        assert cli("train", "--resume", "parts", "--time-limit", "0.001s", "--quiet")[0] == 0
    assert same_training(here / "whole", here / "parts")
    assert not (here / "whole" / "code" / "net").exists() and not (here / "whole" / "net.json").exists()


def test_the_copy_of_the_loss_is_used_and_its_value_is_shown(here, cli, monkeypatch):
    assert cli("train", *SMALL, "--loss", "code/loss.py:smooth", "--out", "run")[0] == 0
    code = read_code(here / "run" / "code" / "loss")
    assert code.files == {"loss.py": LOSS.encode(), "constants.py": b"SPREAD = 0.1\n"}
    assert code.digest in trust_file().read_text()
    (here / "code" / "loss.py").write_text("raise SystemExit('the original was used')\n")
    code, out, err = cli("eval", "run", "--tasks", "4", "--json", "--label-permutations", "2")
    assert code == 0, err
    loss = json.loads(out)["loss"]
    assert loss["loss"] == "loss.py:smooth" and loss["means"].keys() == {"best", "ensemble-2"}
    assert all(0 < mean < 5 and half > 0 for mean, half in loss["means"].values())
    (summary,) = (here / "run" / "eval").glob("*/summary.json")
    assert json.loads(summary.read_text())["loss"] == loss
    code, out, err = cli("eval", "run", "--tasks", "4")
    assert code == 0 and "loss.py:smooth" in out and "accuracy" in out, err
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "of another user"))
    for words in (("eval", "run", "--tasks", "5"), ("train", "--resume", "run"), ("compare", "run")):
        assert is_refused(cli(*words), "run/code/loss has code (loss.py:smooth) that you do not trust"), words
    assert not trust_file().exists()
    assert cli("eval", "run", "--tasks", "5", "--trust-code", "--quiet")[0] == 0
    assert cli("eval", "run", "--tasks", "5", "--quiet")[0] == 0


def test_untrusted_code_of_two_kinds_is_one_error(here, cli):
    (here / "code" / "net.py").write_text(
        "from torch import nn\n"
        "def make(shape, outputs):\n"
        "    return nn.Sequential(nn.Linear(*shape, 9), nn.Tanh(), nn.Linear(9, outputs))\n"
    )
    words = (*CURVES, "--net", "code/net.py:make", "--loss", "code/loss.py:pinball", "--out", "run")
    assert cli("train", *words)[0] == 0
    text = trust_file().read_text()
    net, loss = (read_code(here / "run" / "code" / kind).digest for kind in ("net", "loss"))
    trust_file().unlink()
    code, out, err = cli("eval", "run", "--tasks", "4")
    folder = here / "run" / "code"
    both = f"{folder}/net has code (net.py:make) and {folder}/loss has code (loss.py:pinball)"
    assert is_refused((code, out, err), both)
    for kind, digest in (("net", loss), ("loss", net)):  # the other one is trusted
        lines = [line for line in text.splitlines(keepends=True) if line.startswith(digest)]
        trust_file().write_text("".join(lines))
        assert is_refused(cli("eval", "run", "--tasks", "4"), f"error: {folder}/{kind} has code")
    assert cli("eval", "run", "--tasks", "4", "--trust-code", "--quiet")[0] == 0


def test_code_that_only_a_file_of_settings_names_is_not_run(here, cli):
    assert cli("train", *SMALL, "--loss", "code/loss.py:smooth", "--out", "run")[0] == 0
    (here / "code" / "constants.py").write_text("open('ran', 'w').close()\nSPREAD = 0.2\n")
    words = ("train", "--config", here / "run" / "config.yaml", "--out", "other", "--quiet")
    assert is_refused(cli(*words), "names code")
    assert "or name it with --loss" in cli(*words)[2] and not (here / "ran").exists()
    assert cli(*words, "--trust-code")[0] == 0 and (here / "ran").exists()


def test_own_losses_have_rows_of_their_own_in_a_table(here, cli):
    """A copy of the built-in loss has the scores of the built-in one, up to rounding."""
    for name, loss in (("one", "usual"), ("two", "smooth")):
        words = ("--loss", f"code/loss.py:{loss}", "--seed", "3", "--precision", "float64")
        assert cli("train", *SMALL, *words, "--out", name)[0] == 0
    assert cli("train", *SMALL, "--seed", "3", "--precision", "float64", "--out", "built-in")[0] == 0
    write_losses(here / "code", 0.3)
    words = ("--loss", "code/loss.py:smooth", "--seed", "3", "--precision", "float64")
    assert cli("train", *SMALL, *words, "--out", "three")[0] == 0
    code, out, err = cli("compare", "built-in", "one", "two", "three", "--tasks", "20", "--json", "--quiet")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    labels, scores = [row["label"] for row in rows], [row["best"]["mean"] for row in rows]
    assert len(set(labels)) == 4 and all("loss code=" in label for label in labels[2:])
    assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.process
def test_the_cells_of_a_grid_use_the_loss_of_the_parent(here, cli):
    words = ["compare", "--algos", "maml,protonet", *SMALL, "--loss", "code/loss.py:smooth", "--seeds", "1"]
    words += ["--tasks", "4", "--out", "grid"]
    code, _, err = cli(*words)
    assert code == 0, err
    cells = here / "grid" / "cells"
    (folder,) = cells.glob("*/code/loss")
    assert "protonet" not in str(folder) and read_code(folder).digest in trust_file().read_text()
    assert "loss: null" in next(cells.glob("*protonet*/config.yaml")).read_text()
    assert is_refused(cli("ablate", "--resume", "grid", "--seeds", "2"), "the plan in grid names code")
    write_losses(here / "code", 0.3)
    assert is_refused(cli(*words, "--seeds", "2"), "was trained with another version of loss.py:smooth")


@pytest.mark.process
def test_a_grid_of_losses(here, cli):
    words = ["ablate", *CURVES, "--grid", "loss=huber,code/loss.py:pinball", "--seeds", "1"]
    code, out, err = cli(*words, "--tasks", "4", "--out", "grid", "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert len(rows) == 2 and all(row["best"]["mean"] > 0 for row in rows)
    assert len(list((here / "grid" / "cells").glob("*/code/loss/loss.py"))) == 1


def test_own_images_are_classified_after_adaptation_with_the_loss(here, cli, glyphs_root):
    """A copy of the built-in loss gives its predictions, and another loss gives others."""
    packed = glyphs.open_pack(glyphs_root, on_event=ignore)
    for label, name in enumerate(("ant", "bee", "cow", "dog")):  # one more than in training
        for shot in range(2):
            folder = here / ("learn" if shot else "ask") / name
            folder.mkdir(parents=True)
            Image.fromarray(packed.images_MCHW[packed.starts[label] + shot, 0]).save(folder / "x.png")
    found = {}
    for loss in ("cross_entropy", "code/loss.py:usual", "code/loss.py:smooth"):
        words = ("--loss", loss, "--precision", "float64", "--algo", "maml")
        assert cli("train", *SMALL, *words, "--out", loss)[0] == 0
        code, out, err = cli("eval", loss, "--support", "learn", "--query", "ask", "--json")
        assert code == 0, err
        found[loss] = [list(image["probabilities"].values()) for image in json.loads(out)["predictions"]]
    usual, copied, other = found.values()
    assert np.allclose(usual, copied, atol=1e-6) and not np.allclose(usual, other, atol=1e-4)


def test_curves_and_tables_with_a_loss(here, cli):
    """A copy of the squared error trains as the built-in one; the score is the squared error for all."""
    periodic_csv(here / "tasks.csv", 20)
    scores = {}
    for loss in ("mse", "code/loss.py:squared", "huber", "code/loss.py:pinball"):
        for data in ("sinusoid", "tasks.csv"):
            words = ("--loss", loss, "--precision", "float64", "--engine", "adjoint")
            run = f"{data}-{loss.rpartition(':')[2]}"
            code, _, err = cli("train", *CURVES, "--dataset", data, *words, "--out", run)
            assert code == 0, err
            code, out, err = cli("eval", run, "--tasks", "8", "--json")
            assert code == 0, err
            document = json.loads(out)
            scores[data, loss] = document["results"][0]["mse"]
            assert ("loss" in document) == (loss != "mse")
            if loss == "code/loss.py:squared" and data == "sinusoid":
                assert document["loss"]["means"]["best"][0] == pytest.approx(scores[data, loss], rel=1e-5)
    for data in ("sinusoid", "tasks.csv"):
        assert scores[data, "code/loss.py:squared"] == pytest.approx(scores[data, "mse"], rel=1e-9)
        assert scores[data, "huber"] != pytest.approx(scores[data, "mse"], rel=1e-4)


def test_a_table_predicts_for_a_new_task_from_the_copy(here, cli):
    periodic_csv(here / "tasks.csv", 20)
    words = (*CURVES, "--dataset", "tasks.csv", "--loss", "code/loss.py:pinball", "--out", "run")
    assert cli("train", *words)[0] == 0
    shutil.rmtree(here / "code")
    lines = (here / "tasks.csv").read_text().splitlines()
    head, *rows = [line.split(",") for line in lines]
    kept = [at for at, name in enumerate(head) if name.startswith(("x", "y"))]
    (here / "a.csv").write_text("\n".join(",".join(row[at] for at in kept) for row in [head, *rows[:12]]))
    code, _, err = cli("eval", "run", "--support", "a.csv", "--query", "a.csv", "--json")
    assert code == 0, err
    trust_file().unlink()
    assert is_refused(cli("eval", "run", "--support", "a.csv", "--query", "a.csv"), "do not trust")


def test_the_default_loss_by_its_name_is_bitwise_the_default(here, cli):
    for name, words in (("default", ()), ("named", ("--loss", "cross_entropy"))):
        assert cli("train", *SMALL, *words, "--out", name)[0] == 0
    for name, words in (("curves", ()), ("named curves", ("--loss", "mse"))):
        assert cli("train", *CURVES, *words, "--out", name)[0] == 0
    for one, other in (("default", "named"), ("curves", "named curves")):
        assert open_run(here / one).config.engine == open_run(here / other).config.engine
        assert same_training(here / one, here / other)
    assert open_run(here / "curves").config.engine == "compiled"


@pytest.mark.render
def test_the_figure_of_curves_uses_the_copy_of_the_loss(here, cli):
    assert cli("train", *CURVES, "--loss", "code/loss.py:pinball", "--out", "run")[0] == 0
    shutil.rmtree(here / "code")
    code, _, err = cli("eval", "run", "--tasks", "4", "--plot", "--quiet")
    assert code == 0, err
    assert read_code(here / "run/plots/pretrained/code/loss") == read_code(here / "run/code/loss")


IMAGES, REGRESSION = tuple(SMALL), tuple(CURVES)
SMOOTH = ("--loss", "code/loss.py:smooth")
PROBLEMS = {
    (*IMAGES, "--loss", "cross-entropy"): "did you mean 'cross_entropy'?",
    (*IMAGES, "--loss", "mse"): "--loss mse needs values to predict, but glyphs has images",
    (*IMAGES, "--loss", "huber"): "use cross_entropy or loss.py:fn",
    (*REGRESSION, "--loss", "cross_entropy"): "--loss cross_entropy needs classes, but sinusoid has curves",
    (*IMAGES, "--loss", "code/loss.py"): "write code/loss.py:fn",
    (*IMAGES, "--loss", "code/loss.py:smoth"): "did you mean 'smooth'?",
    (*IMAGES, "--loss", "code/los.py:smooth"): "did you mean 'loss.py'?",
    ("--algo", "protonet", *SMOOTH): "the cross-entropy of negative distances",
    ("--algo", "nearest", *SMOOTH): "--loss has no effect with --algo nearest",
    (*REGRESSION, "--loss", "huber", "--engine", "compiled"): "computes the mean squared error only",
    (*REGRESSION, "--loss", "code/loss.py:usual"): "loss.py, line 17, in usual: ",
    (*IMAGES, "--loss", "torch.nn.functional:cross_entropy"): "returns the shape () for 6 examples",
    (*IMAGES, "--loss", "fails.py:fails"): "fails.py, line 2, in fails: KeyError: 3",
    ("--dataset", "glyphs", "--algo", "transfer", "--loss", "fails.py:of_three"): "in of_three: IndexError",
}


@pytest.mark.parametrize("words", list(PROBLEMS), ids=lambda words: " ".join(words[words.index("--loss") :]))
def test_wrong_losses_are_refused(words, here, cli):
    (here / "fails.py").write_text(
        "def fails(outputs, targets):\n    return {}[3]\n"
        "import torch\n"
        "def of_three(outputs, targets):\n"
        "    return torch.ones(3)[targets] * outputs.square().sum(1)\n"
    )
    assert is_refused(cli("train", *words, "--out", "run"), PROBLEMS[words])
    assert not (here / "run").exists() and not trust_file().exists()


def test_the_loss_in_the_docs_works(here, cli):
    """The page's own file and commands, with fewer meta-steps."""
    page = (DOCS / "your-own.md").read_text()
    (file,) = (block for block in code_blocks(page, "python") if block.startswith("# loss.py"))
    (here / "loss.py").write_text(file)
    lines = "".join(code_blocks(page)).replace("\\\n", "").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("mamlctl") and "runs/smooth" in line]
    assert [words[0] for words in commands] == ["train", "eval"]
    for words in commands:
        fewer = ["--steps-per-epoch", "2", "--val-tasks", "4"] if words[0] == "train" else []
        code, out, err = cli(*words, *fewer, *(["--tasks", "4"] if words[0] == "eval" else []))
        assert code == 0, err
    assert "loss.py:smooth" in out

"""Runs that start from a file, a run or a model (--init), with and without frozen tensors (--freeze)."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.grid_cases import filled, tiny_grid
from helpers.pages import DOCS, code_blocks
from safetensors.torch import save_file

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import read_object
from mamlctl.engine.nets.factory import torchvision_net
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.starting_weights import INIT
from mamlctl.engine.training.weight_files import file_digest
from mamlctl.experiments.grid import compare
from mamlctl.experiments.grid.ablate import check_data
from mamlctl.run_folder import CONFIG, open_run
from mamlctl.shipped_models import FOLDER

SMALL = """
--dataset glyphs --ways 3 --inner-steps 2 --filters 4 --meta-batch-size 2 --epochs 1 --steps-per-epoch 2
--val-tasks 4 --device cpu
"""
NET = """
from torch import nn


def make(shape, outputs):
    return nn.Sequential(
        nn.Conv2d(shape[0], 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(196, outputs)
    )
"""


@pytest.fixture
def train(cli, here, glyphs_root):
    """A function that trains one meta-step of a run called `out`, and returns its notices."""

    def call(*words, out="run", small=SMALL):
        limit = ("--time-limit", "0.001s", "--data-root", glyphs_root)
        code, _, err = cli("train", *small.split(), *words, *limit, "--out", out)
        assert code == 0, err
        return err

    return call


@pytest.fixture
def refused(cli, here, glyphs_root):
    """A function that returns the error of a command that ends with exit code 2."""

    def call(*words):
        code, out, err = cli(*words, "--data-root", glyphs_root)
        assert (code, out) == (2, ""), err
        return err

    return call


def tensors(run, name="previous.pt"):
    """The tensors of a checkpoint without rates: `previous.pt` is that before the first meta-step."""
    stored = checkpoints.load(Path(run, "checkpoints", name), owner=open_run(Path(run)).owner)["stored"]
    return {name: part for name, part in stored.items() if not name.startswith(("rate.", "moment."))}


def named_as_in_torch(stored):
    """The tensors of a checkpoint of conv4 as a state dictionary, with the first row of batch norm."""
    names = {
        name: name.removeprefix("running.").replace(".mean", ".running_mean").replace(".var", ".running_var")
        if name.startswith("running.")
        else name
        for name in stored
    }
    return {names[name]: part[0] if "norm" in name else part for name, part in stored.items()}


def assert_equal_start(run, expected):
    found = named_as_in_torch(tensors(run))
    assert found.keys() == expected.keys()
    for name, part in found.items():
        assert torch.equal(part, expected[name]), name


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_run_starts_bitwise_from_a_file(train, here, ending):
    train("--algo", "maml", "--seed", "7", out="other")
    file = here / f"w{ending}"
    weights = named_as_in_torch(tensors("other", "last.pt"))
    (save_file if ending == ".safetensors" else torch.save)(weights, file)
    notices = train("--algo", "maml++", "--init", file.name)
    assert_equal_start("run", weights)
    stored = tensors("run")
    assert all(torch.equal(rows, rows[:1].expand_as(rows)) for name, rows in stored.items() if "norm" in name)
    record = json.loads((here / "run" / INIT).read_text())
    assert (record["digest"], record["file"]) == (file_digest(file), str(file))
    assert record["read"].keys() == weights.keys() and not record["not_read"]
    assert open_run(here / "run").config.init == str(file)
    assert f"start: 22 of 22 tensors from {file}" in " ".join(notices.split())
    assert "may have been trained on the test classes" in " ".join(notices.split())


def test_a_run_with_an_own_module_starts_from_its_file_and_from_its_run(train, here):
    (here / "net.py").write_text(NET)
    names = {}
    exec(NET, names)
    module = names["make"]((1, 28, 28), 3)
    module[1].running_mean.uniform_()
    torch.save({"state_dict": module.state_dict()}, here / "w.pt")
    small = SMALL.replace("--filters 4", "--net net.py:make")
    notices = train("--algo", "maml++", "--init", "w.pt", small=small, out="first")
    assert "in the entry 'state_dict'" in notices
    own, stored = module.state_dict(), tensors("first")
    assert torch.equal(stored["linear.weight"], own["4.weight"])
    assert torch.equal(stored["running.1.mean"], own["1.running_mean"].expand(2, 4))
    assert torch.equal(stored["1.weight"], own["1.weight"].expand(2, 4))
    # The code in the other run is not used, whatever it is.
    (here / "first/code/net/net.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    train("--algo", "maml++", "--init", "first", small=small)
    assert not (here / "ran").exists()
    best = tensors("first", "last.pt")
    assert all(torch.equal(part, best[name]) for name, part in tensors("run").items())


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [
        (("maml++", "2"), ("maml++", "3"), [0, 1, 1]),
        (("maml++", "3"), ("maml++", "2"), [0, 1]),
        (("maml++", "3"), ("maml", "2"), [0]),
        (("maml", "2"), ("maml++", "3"), [0, 0, 0]),
        (("transfer", "0"), ("maml++", "2"), [0, 0]),
    ],
)
def test_rows_of_batch_norm_are_kept_and_the_last_one_is_repeated(train, source, target, rows):
    for (algo, steps), out, more in ((source, "first", ()), (target, "run", ("--init", "first"))):
        skip = ("--init-skip", "head") if more and source[0] == "transfer" else ()
        train("--algo", algo, "--inner-steps", steps, *more, *skip, out=out)
    first, run = tensors("first", "last.pt"), tensors("run")
    for name in ("norm1.weight", "norm1.bias", "running.norm4.mean", "running.norm4.var"):
        of_first = first[name] if first[name].dim() == 2 else first[name].unsqueeze(0)
        assert torch.equal(run[name], of_first[rows]), name
    assert torch.equal(run["conv3.weight"], first["conv3.weight"])
    # The same data and split: the weights have not seen the test classes.
    assert json.loads(Path("run", INIT).read_text())["caveat"] == ""


def test_a_run_starts_from_a_model_by_its_name(train, here):
    words = ["--filters", "64", "--algo", "maml", "--init", "omniglot-5w1s", "--init-skip", "head"]
    config = open_run(FOLDER / "omniglot-5w1s").config
    for name in ("pooling", "readout", "activation"):
        if getattr(config, name) is not None:
            words += [f"--{name}", getattr(config, name)]
    words[1] = str(config.filters)
    notices = train(*words, small=SMALL.replace("--filters 4", ""))
    model, run = tensors(FOLDER / "omniglot-5w1s", "best.pt"), tensors("run")
    for name in ("conv1.weight", "conv4.weight"):
        assert torch.equal(run[name], model[name])
    assert torch.equal(run["norm2.weight"][0], model["norm2.weight"][0])
    assert not torch.equal(run["linear.weight"], model["linear.weight"][:3])
    assert open_run(here / "run").config.init == "omniglot-5w1s" and not (here / "runs").exists()
    assert "as drawn: linear.weight, linear.bias" in " ".join(notices.split())
    caveat = "the start, omniglot-5w1s, may have been trained on the test classes"
    assert caveat in " ".join(notices.split())
    # A run that starts from this one has the same caveat.
    train(*words[:4], *words[8:], "--init", "run", out="next", small=SMALL.replace("--filters 4", ""))
    assert json.loads(Path("next", INIT).read_text())["caveat"] == caveat


def test_a_run_that_was_killed_before_its_first_checkpoint_reads_the_same_file_again(
    train, refused, here, cli, glyphs_root
):
    train("--algo", "maml", "--seed", "7", out="other")
    torch.save(named_as_in_torch(tensors("other", "last.pt")), here / "w.pt")
    train("--algo", "maml++", "--init", "w.pt")
    killed = here / "killed"
    killed.mkdir()
    for name in (CONFIG, INIT, "environment.json", "command.txt"):
        shutil.copy(here / "run" / name, killed / name)
    resume = ("train", "--resume", "killed", "--time-limit", "0.001s")
    torch.save(named_as_in_torch(tensors("other")), here / "changed.pt")
    (here / "w.pt").rename(here / "kept.pt")
    (here / "changed.pt").rename(here / "w.pt")
    message = refused(*resume)
    assert file_digest(here / "w.pt")[:12] in message and file_digest(here / "kept.pt")[:12] in message
    assert not (killed / "checkpoints").exists()
    (here / "w.pt").unlink()
    assert "there is no file, run folder or model" in refused(*resume)
    (here / "kept.pt").rename(here / "w.pt")
    (killed / INIT).unlink()  # killed even before it wrote this file
    assert cli(*resume, "--data-root", glyphs_root)[0] == 0
    assert json.loads((killed / INIT).read_text()) == json.loads((here / "run" / INIT).read_text())
    for name in ("previous.pt", "last.pt"):
        expected = tensors("run", name)
        assert all(torch.equal(part, expected[key]) for key, part in tensors("killed", name).items())


def test_the_file_is_not_needed_after_the_first_checkpoint(train, here, cli, glyphs_root):
    train("--algo", "maml", "--seed", "7", out="other")
    torch.save(named_as_in_torch(tensors("other", "last.pt")), here / "w.pt")
    train("--algo", "anil", "--init", "w.pt", "--freeze", "body")
    (here / "w.pt").unlink()
    frozen = {name: part for name, part in tensors("run").items() if not name.startswith("linear.")}
    assert cli("train", "--resume", "run", "--data-root", glyphs_root)[0] == 0
    code, out, err = cli("eval", "run", "--tasks", "4", "--json", "--data-root", glyphs_root)
    assert code == 0, err
    assert (
        f"the start, {here / 'w.pt'}, may have been trained on the test classes" in json.loads(out)["notes"]
    )
    ended = tensors("run", "last.pt")
    assert all(torch.equal(ended[name], part) for name, part in frozen.items())
    assert not torch.equal(ended["linear.weight"], tensors("other", "last.pt")["linear.weight"])


def test_what_cannot_be_used_is_refused_before_a_run_folder_is_made(train, refused, here):
    words = ("train", *SMALL.split(), "--out", "run")
    assert "did you mean 'omniglot-5w1s'?" in refused(*words, "--init", "omniglot-5w")
    assert "is not a run folder" in refused(*words, "--init", ".")
    assert "there is no file" in refused(*words, "--init=")
    assert "there is no file, run folder or model" in refused(*words, "--init", "x" * 300 + "/w.pt")
    assert "--init-skip has no effect without --init" in refused(*words, "--init-skip", "head")
    (here / "w.pt").write_text("nothing")
    assert "cannot be read" in refused(*words, "--init", "w.pt")
    train("--algo", "maml", "--ways", "5", out="other")
    message = refused(*words, "--init", "other")
    assert "linear.weight (5x4 in place of 3x4)" in message and "add --init-skip head" in message
    assert "matches no tensor" in refused(*words, "--freeze", "fc")
    assert not (here / "run").exists()


def test_settings_name_the_file_by_its_absolute_path(cli, here):
    (here / "w.pt").touch()
    for given, expected in (("w.pt", str(here / "w.pt")), ("omniglot-5w1s", "omniglot-5w1s")):
        code, out, _ = cli("train", "--dataset", "glyphs", "--init", given, "--print-config")
        assert code == 0 and f"init: {expected} " in out


@pytest.mark.process
def test_the_cells_of_a_grid_start_from_the_same_file(train, here, glyphs_root):
    train("--algo", "maml", "--seed", "7", out="other")
    torch.save(named_as_in_torch(tensors("other", "last.pt")), here / "w.pt")
    events = []
    grid = tiny_grid(here / "grid", glyphs_root, "inner_lr=0.1,0.2", seeds=(0,), init="w.pt", freeze="conv1")
    check_data(grid, offline=True, on_event=events.append)
    texts = [getattr(event, "text", "") for event in events]
    assert sum(text.startswith("start: ") for text in texts) == 1
    filled(grid)
    first = torch.load(here / "w.pt", weights_only=True)
    for cell in grid.cells:
        stored = tensors(cell.folder, "last.pt")
        assert torch.equal(stored["conv1.weight"], first["conv1.weight"])
        assert not torch.equal(stored["conv2.weight"], first["conv2.weight"])
    (here / "w.pt").unlink()
    check_data(grid, offline=True, on_event=events.append)  # nothing is left to train
    shutil.rmtree(grid.cells[1].folder / "checkpoints")
    with pytest.raises(SettingsError, match="there is no file"):
        check_data(grid, offline=True, on_event=events.append)
    torch.save(named_as_in_torch(tensors("other")), here / "w.pt")
    with pytest.raises(SettingsError, match=r"w\.pt has digest .{12}, but .*cells.* started from .{12}"):
        check_data(grid, offline=True, on_event=events.append)


def test_runs_from_two_versions_of_a_file_do_not_share_a_row(train, here):
    train("--algo", "maml", "--seed", "7", out="other")
    for number, name in enumerate(("previous.pt", "last.pt", "last.pt")):
        torch.save(named_as_in_torch(tensors("other", name)), here / "w.pt")
        train("--algo", "maml", "--init", "w.pt", "--seed", number, out=f"run{number}")
    rows = compare._row_specs([compare._Run(open_run(here / f"run{number}"), "") for number in range(3)])
    assert [len(row.runs) for row in rows] == [1, 2]
    assert all(re.fullmatch("maml, init digest=[0-9a-f]{12}", row.label) for row in rows)
    (here / "new").mkdir()
    shutil.copy("w.pt", "new/w.pt")
    train("--algo", "maml", "--init", "new/w.pt", out="run3")

    def labels(*runs):
        return [
            row.label for row in compare._row_specs([compare._Run(open_run(Path(run)), "") for run in runs])
        ]

    digest = read_object(Path("run3", INIT))["digest"][:12]
    assert labels("run3", "other") == [f"maml, init=w.pt, init digest={digest}", "maml, init=None"]
    one, two = (f"maml, init={here / name}" for name in ("w.pt", "new/w.pt"))
    assert labels("run1", "run3") == [one, two]


def test_a_grid_over_starts_has_a_row_for_each(train, here, glyphs_root):
    train("--algo", "maml", "--seed", "7", out="other")
    grid = tiny_grid(here / "grid", glyphs_root, "init=null,other", "freeze=body,conv1", seeds=(0,))
    rows = {row.label: row.config for row in grid.rows}
    assert [config.init for config in rows.values()] == [None, None, str(here / "other"), str(here / "other")]
    check_data(grid, offline=True, on_event=[].append)


@pytest.mark.process  # since torchvision's network takes many seconds per command
def test_the_lines_of_the_docs_start_from_the_backbone(cli, here, glyphs_root):
    """One of the page's commands on glyphs, with one meta-step."""
    torch.manual_seed(0)
    module = torchvision_net("resnet18", (3, 28, 28), 1000)
    torch.save(module.state_dict(), here / "resnet18.pth")
    lines = "\n".join(code_blocks((DOCS / "your-own.md").read_text())).splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("mamlctl") and "--init" in line]
    by_algorithm = {words[words.index("--algo") + 1]: words for words in commands}
    assert list(by_algorithm) == ["transfer", "protonet", "anil", "maml++"]
    fewer = f"--ways 2 --queries 1 --meta-batch-size 2 --device cpu --data-root {glyphs_root}".split()
    expected = module.state_dict()
    words = [word.replace("cifar-fs", "glyphs") for word in by_algorithm["anil"]]
    code, _, err = cli("train", *words[1:], *fewer, "--time-limit", "0.001s", "--out", "run")
    assert code == 0, err
    assert "100 of 102 tensors from" in " ".join(err.split())
    first, last = tensors("run"), tensors("run", "last.pt")
    for name in ("conv1.weight", "layer4.1.conv2.weight", "layer2.0.downsample.0.weight"):
        assert torch.equal(first[name], expected[name]) and torch.equal(last[name], expected[name])
    for name in ("mean", "var"):
        rows = first[f"running.layer1.0.bn1.{name}"]
        assert torch.equal(rows, expected[f"layer1.0.bn1.running_{name}"].expand_as(rows))


def test_scratch_tests_the_start_itself(train, here):
    train("--algo", "maml", "--seed", "7", out="other")
    train(
        "--algo",
        "scratch",
        "--init",
        "other",
        small=SMALL.replace("--inner-steps 2", "").replace("--steps-per-epoch 2", ""),
    )
    first, last = tensors("other", "last.pt"), tensors("run", "last.pt")
    for name, part in first.items():
        if not name.startswith("running."):
            assert torch.equal(last[name], part[0] if "norm" in name else part), name


def test_a_run_on_curves_starts_from_another_one(train, here):
    small = "--dataset sinusoid --meta-batch-size 2 --epochs 1 --steps-per-epoch 9 --val-tasks 4 --device cpu"
    train(small=small, out="other")
    train("--init", "other", "--freeze", "hidden2,head", small=small)
    first, start, last = tensors("other", "last.pt"), tensors("run"), tensors("run", "last.pt")
    assert all(torch.equal(part, first[name]) for name, part in start.items())
    changed = {name for name, part in last.items() if not torch.equal(part, first[name])}
    assert changed == {"hidden1.weight", "hidden1.bias"}
    assert json.loads(Path("run", INIT).read_text())["caveat"] == ""

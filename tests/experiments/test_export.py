"""`eval --export`: files for ONNX and torch.export predict as `eval` does, or are not written."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.own_tables import csv_text, linear_tasks, periodic_csv
from helpers.pages import DOCS, code_blocks
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import ExitCode
from mamlctl.data.sets import glyphs
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train

SMALL = {"meta_batch_size": 2, "epochs": 1, "steps_per_epoch": 2, "val_tasks": 4, "device": "cpu"}
IMAGES = SMALL | {"dataset": "glyphs", "ways": 3, "shots": 2, "queries": 2, "filters": 4}
TABLE = SMALL | {"shots": 4, "queries": 6, "hidden": "8", "report_every": 1}
FORMATS = ("onnx", "pt2")
NAMES = ("ant", "bee", "cow")

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, shape, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(4 * 7 * 7, outputs)

    def forward(self, x):
        h = self.drop(self.body(x).flatten(1))
        # here
        return self.out(h)
"""
UNSUPPORTED = {
    "h = torch.special.i0e(h)": "no operator for prims.bessel_i0e.default in Net (",
    "h = h * 2 if h.sum() > 1e9 else h": "line 15, in forward: GuardOnDataDependentSymNode",
    "h = h.view(len(h), -1) if len(h) == 3 else h": "its code fixes the number of examples",
}


def needs_onnx():
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def run_file(path, inputs):
    """What an exported file predicts, and its metadata."""
    if path.suffix == ".pt2":
        files = {"mamlctl.json": ""}
        module = torch.export.load(path, extra_files=files).module()
        return module(torch.from_numpy(inputs)).detach().numpy(), json.loads(files["mamlctl.json"])
    needs_onnx()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    about = json.loads(session.get_modelmeta().custom_metadata_map["mamlctl"])
    assert about["input"]["name"] == name
    return session.run([about["output"]["name"]], {name: inputs})[0], about


def make_run(folder, **settings):
    config = resolve_settings([("flag", settings)]).config
    train(config, out=folder, offline=True, time_limit_s=None, command="test", on_event=ignore)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, glyphs_root):
    """A function that trains a run on images with these settings once."""
    made = {}

    def make(algo, **settings):
        key = (algo, *sorted(settings.items()))
        if key not in made:
            values = IMAGES | {"algo": algo, "data_root": str(glyphs_root)} | settings
            values |= {"train_shots": 4} if algo == "reptile" else {}
            made[key] = make_run(tmp_path_factory.mktemp(algo) / "run", **values)
        return made[key]

    return make


@pytest.fixture(scope="module")
def images(tmp_path_factory, glyphs_root):
    """A folder with support images in `learn` and query images in `ask`."""
    folder, packed = tmp_path_factory.mktemp("images"), glyphs.open_pack(glyphs_root, on_event=ignore)
    for label, name in enumerate(NAMES):
        for place in range(4):
            path = folder / ("learn" if place < label + 1 else "ask") / name
            path.mkdir(parents=True, exist_ok=True)
            pixels = packed.images_MCHW[packed.starts[label] + place, 0]
            Image.fromarray(pixels).save(path / f"{place}.png")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on a table of one input and one target, and two tables of a new task."""
    folder = tmp_path_factory.mktemp("table")
    periodic_csv(folder / "tasks.csv")
    make_run(folder / "run", **TABLE, dataset=str(folder / "tasks.csv"))
    (folder / "a.csv").write_text(csv_text([(1.5, 20), (3, 25), (7, 12.5)], ("x", "y")))
    (folder / "b.csv").write_text(csv_text([(0.5,), (4.25,), (9,)], ("x",)))
    return folder


def pixels_of(files):
    return np.stack([np.array(Image.open(file))[None] for file in files])


def is_refused(answer, words):
    """Whether a command ended with exit code 2 and an error of two lines that contains the words."""
    code, out, err = answer
    lines = err.splitlines()
    two = len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint:  ")
    return code == ExitCode.USAGE and not out and two and words in err


def assert_predicts_as_eval(cli, run, images, path, *words, reference=(), most=1e-5):
    """Export a run, and compare the file with what `eval` prints for the query images."""
    command = ("eval", run, "--support", images / "learn", "--query", images / "ask", "--json", *words)
    code, out, err = cli(*command, "--export", path)
    assert code == ExitCode.OK, err
    exported = json.loads(out)["exported"]
    assert exported["file"] == str(path) and exported["difference"] < most
    document = json.loads(cli(*command, *reference)[1] if reference else out)
    expected = np.array([list(image["probabilities"].values()) for image in document["predictions"]])
    pixels = pixels_of([image["file"] for image in document["predictions"]])
    predicted, about = run_file(path, pixels)
    assert exported["checked"] == len(pixels) + sum(document["support"].values())
    assert np.abs(predicted - expected).max() < most
    alone = np.concatenate([run_file(path, pixels[[place]])[0] for place in range(2)])
    assert np.abs(alone - expected[:2]).max() < most
    assert about["bn"] == document["bn"] and about["classes"] == list(NAMES)
    return about, err


@pytest.mark.parametrize("bn", ["support", "running", "transductive"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_an_exported_conv4_predicts_as_eval_does(suffix, bn, runs, images, cli, tmp_path):
    """Its frozen statistics are those of the support set, also with --bn transductive."""
    if suffix == "onnx":
        needs_onnx()
    frozen = ("--bn", "support") if bn == "transductive" else ()
    run, path = runs("maml++"), tmp_path / f"mine.{suffix}"
    about, err = assert_predicts_as_eval(cli, run, images, path, "--bn", bn, reference=frozen)
    assert ("exported with the support set's statistics" in err) == (bn == "transductive")
    assert (about["side"], about["channels"], about["ink"], about["resize"]) == (28, 1, 1, "bilinear")


@pytest.mark.parametrize("algo", ["protonet", "nearest", "reptile", "transfer"])
def test_every_kind_of_head_is_exported(algo, runs, images, cli, tmp_path):
    assert_predicts_as_eval(cli, runs(algo), images, tmp_path / "mine.pt2")


@pytest.mark.parametrize(
    "settings", [{"net": "mlp", "hidden": "8", "filters": 64}, {"net": "resnet12", "filters": 2}]
)
def test_other_networks_are_exported(settings, runs, images, cli, tmp_path):
    """Rounding adds up over the layers of resnet12: 1.04e-5 was measured on an Intel Xeon."""
    needs_onnx()
    assert_predicts_as_eval(cli, runs("nearest", **settings), images, tmp_path / "mine.onnx", most=1e-4)


def train_own(cli, folder, glyphs_root, text=NET):
    (folder / "net.py").write_text(text)
    words = "--dataset glyphs --ways 3 --epochs 1 --steps-per-epoch 2 --val-tasks 2 --device cpu --quiet"
    words = (*words.split(), "--data-root", glyphs_root, "--algo", "protonet")
    code, _, err = cli("train", *words, "--net", f"{folder}/net.py:Net", "--out", folder / "run")
    assert code == ExitCode.OK, err
    (folder / "net.py").unlink()
    return folder / "run"


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_own_module_is_exported_without_its_file(suffix, cli, images, glyphs_root, tmp_path):
    if suffix == "onnx":
        needs_onnx()
    run = train_own(cli, tmp_path, glyphs_root)
    about, _ = assert_predicts_as_eval(cli, run, images, tmp_path / f"mine.{suffix}")
    assert about["net"] == "net.py:Net"


def test_layers_without_a_place_for_statistics_are_named_when_weights_are_saved(
    cli, images, glyphs_root, tmp_path
):
    run = train_own(cli, tmp_path, glyphs_root, NET.replace("2d(4)", "2d(4, track_running_stats=False)"))
    _, err = assert_predicts_as_eval(
        cli, run, images, tmp_path / "mine.pt2", "--save-adapted", tmp_path / "mine.pt"
    )
    assert "saved without the statistics of body.1, since track_running_stats is False" in err
    assert not any("running" in name for name in torch.load(tmp_path / "mine.pt")["weights"])


@pytest.mark.parametrize("line", list(UNSUPPORTED))
def test_an_unsupported_operation_is_named_and_leaves_no_file(line, cli, images, glyphs_root, tmp_path):
    needs_onnx()
    run = train_own(cli, tmp_path, glyphs_root, NET.replace("# here", line))
    (tmp_path / "out").mkdir()
    command = ("eval", run, "--support", images / "learn", "--export", tmp_path / "out" / "mine.onnx")
    assert is_refused(cli(*command), UNSUPPORTED[line])
    assert [*(tmp_path / "out").iterdir()] == []


def test_other_predictions_than_those_of_eval_leave_no_file(runs, images, cli, tmp_path, monkeypatch):
    from mamlctl.experiments.export import models

    original = models.ImagePredictor
    monkeypatch.setattr(models, "ImagePredictor", lambda *args, **more: original(*args, **more | {"ink": 0}))
    (tmp_path / "out").mkdir()
    command = ("eval", runs("maml++"), "--support", images / "learn", "--export", tmp_path / "out" / "a.pt2")
    command += ("--save-adapted", tmp_path / "out" / "a.pt")
    assert is_refused(cli(*command), "its predictions differ from those of eval by ")
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_network_for_a_table_takes_and_gives_the_units_of_the_table(suffix, table, cli, tmp_path):
    if suffix == "onnx":
        needs_onnx()
    path = tmp_path / f"t.{suffix}"
    words = ("eval", table / "run", "--support", table / "a.csv", "--device", "cpu", "--json")
    code, out, err = cli(*words, "--query", table / "b.csv", "--export", path)
    assert code == ExitCode.OK, err
    rows = json.loads(out)["predictions"]
    inputs = np.array([list(row["inputs"].values()) for row in rows])
    expected = np.array([list(row["predicted"].values()) for row in rows])
    predicted, about = run_file(path, inputs)
    assert np.abs(predicted - expected).max() < 1e-5 * about["deviation"][1]
    assert np.abs(run_file(path, inputs[:1])[0] - expected[:1]).max() < 1e-5 * about["deviation"][1]
    assert about["inputs"] == ["x"] and about["targets"] == ["y"] and predicted.dtype == np.float64
    assert json.loads(out)["exported"]["checked"] == 6


def test_a_table_is_exported_without_a_query(tmp_path, cli):
    """With two inputs and two targets of very different scales."""
    (tmp_path / "t.csv").write_text(csv_text(*linear_tasks(20, 12)))
    make_run(tmp_path / "run", **TABLE, dataset=str(tmp_path / "t.csv"))
    lines, heads = linear_tasks(1, 8, seed=50)
    (tmp_path / "a.csv").write_text(csv_text([row[1:] for row in lines], heads[1:]))
    words = ("eval", tmp_path / "run", "--support", tmp_path / "a.csv", "--device", "cpu")
    code, out, err = cli(*words, "--export", tmp_path / "t.pt2")
    assert code == ExitCode.OK and "exported to" in out and "predicted" not in out, err
    rows = json.loads(cli(*words, "--query", tmp_path / "a.csv", "--json")[1])["predictions"]
    expected = np.array([list(row["predicted"].values()) for row in rows])
    predicted, about = run_file(tmp_path / "t.pt2", np.array([row[1:3] for row in lines]))
    assert (np.abs(predicted - expected).max(0) < 1e-5 * np.array(about["deviation"][2:])).all()


def test_a_module_with_batch_norm_on_a_table_is_exported_with_fixed_statistics(table, cli, tmp_path):
    """Its run predicts all rows of a query table together, which a file for any number of rows cannot."""
    text = NET.replace(
        "nn.Conv2d(shape[0], 4, 3, 4, 1), nn.BatchNorm2d(4)", "nn.Linear(1, 196), nn.BatchNorm1d(196)"
    )
    (tmp_path / "net.py").write_text(text)
    make_run(
        tmp_path / "run",
        **SMALL | {"shots": 4, "queries": 6, "algo": "maml", "report_every": 1},
        dataset=str(table / "tasks.csv"),
        net=f"{tmp_path}/net.py:Net",
    )
    words = ("eval", tmp_path / "run", "--support", table / "a.csv", "--query", table / "b.csv", "--json")
    code, out, err = cli(*words, "--export", tmp_path / "t.pt2", "--device", "cpu")
    assert code == ExitCode.OK and "exported with the support set's statistics" in err
    assert json.loads(out)["exported"]["difference"] < 1e-5
    rows = np.array([[0.5], [4.25], [9.0]])
    together, about = run_file(tmp_path / "t.pt2", rows)
    alone = np.concatenate([run_file(tmp_path / "t.pt2", row[None])[0] for row in rows])
    assert np.allclose(together, alone, rtol=1e-6) and about["bn"] == "support"


def test_files_are_reproducible_and_name_no_folder(runs, images, cli, tmp_path):
    needs_onnx()
    run = shutil.copytree(runs("maml++"), tmp_path / "run")
    for name in ("a.onnx", "b.onnx", "a.pt2", "b.pt2"):
        assert cli("eval", run, "--support", images / "learn", "--export", tmp_path / name)[0] == ExitCode.OK
    for suffix in FORMATS:
        one, two = (tmp_path.joinpath(f"{name}.{suffix}").read_bytes() for name in "ab")
        assert one == two and str(tmp_path).encode() not in one and b".py" not in one


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mine.pth", "does not end in .onnx or .pt2"),
        ("taken.onnx", "exists already"),
        ("folder.onnx", "is a folder"),
        ("missing/mine.pt2", "which is not a folder"),
        ("taken.onnx/mine.pt2", "which is not a folder"),
        pytest.param(
            "/proc/mine.pt2",
            "cannot be written",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux"),
        ),
    ],
)
def test_paths_that_cannot_be_written_are_refused_before_the_work(name, words, cli, tmp_path):
    (tmp_path / "taken.onnx").write_text("kept")
    (tmp_path / "folder.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    command = ("eval", tmp_path / "no-run", "--support", tmp_path, "--export", tmp_path / name)
    assert is_refused(cli(*command), words)
    assert (tmp_path / "taken.onnx").read_text() == "kept" and sorted(tmp_path.iterdir()) == before


def test_two_options_that_write_the_same_file_are_refused(cli, tmp_path):
    command = ("eval", tmp_path / "no-run", "--support", tmp_path, "--export", tmp_path / "mine.pt2")
    answer = cli(*command, "--save-adapted", tmp_path / "mine.pt2")
    assert is_refused(answer, "--save-adapted and --export both write")


def test_missing_packages_are_refused_before_the_work(cli, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    command = ("eval", tmp_path / "no-run", "--support", tmp_path, "--export", tmp_path / "mine.onnx")
    answer = cli(*command)
    assert is_refused(answer, "needs onnx and onnxscript and onnxruntime, which are not installed")
    assert "pip install 'mamlctl[onnx]'" in answer[2]


def test_export_without_support_has_no_effect(cli, tmp_path):
    answer = cli("eval", tmp_path / "no-run", "--export", tmp_path / "mine.onnx")
    assert is_refused(answer, "--export has no effect without --support")


def test_the_code_in_the_docs_works(runs, images, table, cli, tmp_path, monkeypatch, capsys):
    """Each block prints the predictions of `eval`."""
    needs_onnx()
    with_onnxruntime, with_torch, with_rows = code_blocks((DOCS / "export.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((images / "ask" / "bee").iterdir()), "query.png")
    words = ("--support", images / "learn", "--query", "query.png", "--json")
    for name, code in (("mine.onnx", with_onnxruntime), ("mine.pt2", with_torch)):
        document = json.loads(cli("eval", runs("maml++"), *words, "--export", name)[1])
        exec(code, {})
        printed = eval(capsys.readouterr().out)
        expected = document["predictions"][0]["probabilities"]
        assert list(printed) == list(expected)
        assert np.allclose([*printed.values()], [*expected.values()], atol=1e-5)
    words = ("--support", table / "a.csv", "--query", table / "b.csv", "--export", "table.onnx", "--json")
    rows = json.loads(cli("eval", table / "run", *words)[1])["predictions"]
    exec(with_rows.replace("[[0.5], [9.0]]", str([[row["inputs"]["x"]] for row in rows])), {})
    printed = np.array(eval(capsys.readouterr().out))
    assert np.allclose(printed[:, 0], [row["predicted"]["y"] for row in rows], rtol=1e-5)

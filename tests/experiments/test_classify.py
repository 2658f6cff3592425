"""Tests of own images, compared with the evaluator, with torch's own layers and with an explicit loop."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.engine_cases import slow_forward
from helpers.pages import DOCS, code_blocks
from helpers.shared import ignore
from PIL import Image

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice
from mamlctl.core.results import ClassifiedImage
from mamlctl.core.statistics import wilson95
from mamlctl.data.sets import glyphs
from mamlctl.data.tasks.user_images import find_queries
from mamlctl.display.predictions import document
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.evaluation.adapted_model import resize_head
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.experiments.classify import ClassifyRequest, _write_csv, classify_images
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train
from mamlctl.experiments.trained_model import load_trained_model
from mamlctl.report.figures import contact_sheet
from mamlctl.report.figures.style import GREEN, RED
from mamlctl.settings.evaluation import EvalConfig

SMALL = {"dataset": "glyphs", "ways": 3, "shots": 2, "queries": 2, "filters": 4, "val_tasks": 2, "epochs": 1}
SMALL |= {"meta_batch_size": 2, "steps_per_epoch": 2}
IMAGED = [name for name in ALGORITHMS if name not in ("fomaml", "oracle")]  # fomaml predicts as maml
NAMES = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")


@pytest.fixture(scope="session")
def packed(glyphs_root):
    return glyphs.open_pack(glyphs_root, on_event=ignore)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs_root):
    """A function that trains a run with these settings once, and then removes its data."""
    runs = {}

    def make(algo, **settings):
        key = (algo, *sorted(settings.items()))
        if key not in runs:
            folder = tmp_path_factory.mktemp(algo)
            shutil.copytree(glyphs_root, folder / "data")
            values = {**SMALL, "algo": algo, "data_root": str(folder / "data"), **settings}
            if algo == "reptile":
                values = {"inner_steps": 2, "eval_inner_steps": 3, "train_shots": 4, **values}
            if algo == "scratch":
                values.pop("epochs"), values.pop("steps_per_epoch")
            config = resolve_settings([("flag", values)]).config
            where = {"out": folder / "run", "offline": True, "time_limit_s": None}
            train(config, **where, command="test", on_event=ignore)
            shutil.rmtree(folder / "data")
            runs[key] = folder / "run"
        return runs[key]

    return make


def write(folder, packed, images, name="x"):
    """Write images of the pack to files in order, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}{place:02d}.png" for place in range(len(images))]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(packed.images_MCHW[image, 0]).save(file)
    return files


def folders(folder, packed, shots, queries=2, first=0):
    """Write class folders of glyphs, with shots[c] support images of class c and labelled queries."""
    for label, count in enumerate(shots):
        start = packed.starts[first + label]
        write(folder / "learn" / NAMES[label], packed, range(start, start + count))
        write(folder / "ask" / NAMES[label], packed, range(start + count, start + count + queries))
    return folder / "learn", folder / "ask"


def classify(run, support, *queries, on_event=ignore, settings=None, **request):
    return classify_images(
        run, settings or EvalConfig(), ClassifyRequest(support, queries, **request), on_event=on_event
    )


def table(result):
    return np.array([image.probabilities for image in result.images if image.probabilities])


@pytest.mark.parametrize("algo", IMAGED)
def test_an_episode_in_folders_has_the_same_predictions(algo, trained, packed, glyphs_root, tmp_path):
    """In all three batch-norm modes, with the run's own ways."""
    run = trained(algo)
    settings = EvalConfig(data_root=str(glyphs_root))
    stream = load_trained_model(run, settings, offline=True, on_event=ignore).stream
    images_NE = stream.indices(0, 1)[0][0]
    for label, images_E in enumerate(images_NE):
        write(tmp_path / "learn" / NAMES[label], packed, images_E[:2])
        write(tmp_path / "ask" / NAMES[label], packed, images_E[2:])
    for bn in ("transductive", "support", "running"):
        model = load_trained_model(run, replace(settings, bn=bn), offline=True, on_event=ignore)
        state, episodes = model.states[0].frozen(), model.stream.episodes(0, 1)
        outputs_ITEN = model.predict(
            PredictRequest(TaskSets(model.derivatives, episodes), state, model.inner_steps, model.statistics)
        )
        result = classify(run, tmp_path / "learn", tmp_path / "ask", settings=EvalConfig(bn=bn))
        expected = outputs_ITEN[-1, 0].double().softmax(-1)
        assert np.allclose(table(result), expected, atol=2e-5), bn
        assert (result.labelled, result.bn) == (6, bn)
        truth = np.repeat(np.arange(3), 2)
        assert result.right == int((expected.argmax(-1).numpy() == truth).sum())


@pytest.mark.parametrize("algo", IMAGED)
def test_every_algorithm_supports_other_ways_and_unequal_classes(algo, trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 3])
    result = classify(trained(algo), support, query)
    assert table(result).shape == (4, 2) and result.shots == (1, 3)
    assert np.allclose(table(result).sum(1), 1)
    more, query = folders(tmp_path / "more", packed, [2, 1, 2, 3, 1])
    if algo == "boil":
        with pytest.raises(SettingsError, match="5 classes, but the run has a head for 3, which is not"):
            classify(trained(algo), more, query)
    else:
        assert table(classify(trained(algo), more, query)).shape == (10, 5)


def test_classes_are_weighted_by_their_number_of_images(trained, packed, tmp_path):
    """Compare with gradient descent on the mean loss over all images, by torch's autograd and batch norm."""
    run = trained("maml++", inner_steps=3)
    support, query = folders(tmp_path, packed, [1, 4, 2])
    result = classify(run, support, query, settings=EvalConfig(bn="transductive"))
    state = open_state(run)

    def pixels(files):
        images = [np.array(Image.open(file)) for file in files]
        return 1 - torch.from_numpy(np.stack(images)).unsqueeze(1) / 255

    fast = {name: tensor.clone().requires_grad_() for name, tensor in state.slow.items()}
    x, y = pixels(sorted(support.rglob("*.png"))), torch.tensor([0, 1, 1, 1, 1, 2, 2])
    for step in range(3):
        loss = F.cross_entropy(slow_forward(fast, state.norm, step, x), y)
        grads = torch.autograd.grad(loss, list(fast.values()))
        fast = {
            name: weight - state.rates[name][step] * grad
            for (name, weight), grad in zip(fast.items(), grads, strict=True)
        }
    scores = slow_forward(fast, state.norm, 2, pixels(sorted(query.rglob("*.png"))))
    assert np.allclose(table(result), scores.softmax(1).detach(), atol=1e-5)


def open_state(run):
    from mamlctl.engine.training.run_code import RunCode
    from mamlctl.experiments.trained_model import checkpoint_files, load_states
    from mamlctl.run_folder import open_run

    opened = open_run(run)
    files, _ = checkpoint_files(opened, None, ignore)
    states, *_ = load_states(
        opened, files, EvalConfig(), (1, 28, 28), torch.device("cpu"), ignore, code=RunCode()
    )
    return states[0].frozen()


def test_prototypes_and_nearest_neighbours_work_with_unequal_classes(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 4, 2])
    y = np.array([0, 1, 1, 1, 1, 2, 2])
    for algo in ("protonet", "nearest"):
        run, features = trained(algo), {}
        state = open_state(run)
        eye = {"linear.weight": torch.eye(4), "linear.bias": torch.zeros(4)}
        for name, folder in (("support", support), ("query", query)):
            x = np.stack([np.array(Image.open(file)) for file in sorted(folder.rglob("*.png"))])
            x = 1 - torch.from_numpy(x).unsqueeze(1) / 255
            features[name] = slow_forward(state.slow | eye, state.norm, 0, x).double()
        distances = torch.cdist(features["query"], features["support"]).square()
        per_class = [distances[:, y == label].amin(1) for label in range(3)]
        if algo == "protonet":
            means = torch.stack([features["support"][y == label].mean(0) for label in range(3)])
            per_class = torch.cdist(features["query"], means).square().unbind(1)
        expected = (-torch.stack(list(per_class), 1)).softmax(1)
        result = classify(run, support, query, settings=EvalConfig(bn="transductive"))
        assert np.allclose(table(result), expected, atol=2e-4)


def test_predictions_do_not_depend_on_the_other_queries(trained, packed, tmp_path, monkeypatch):
    run = trained("maml++")
    support, query = folders(tmp_path, packed, [2, 2, 2])
    whole = classify(run, support, query)
    assert whole.bn == "support"  # the run's own is transductive
    files = sorted(query.rglob("*.png"))
    alone = np.concatenate([table(classify(run, support, file)) for file in files])
    assert np.allclose(table(whole), alone, atol=1e-6)
    monkeypatch.setattr("mamlctl.experiments.classify.tasks_per_pass", lambda *_: 4)
    assert np.allclose(table(classify(run, support, query)), alone, atol=1e-6)
    monkeypatch.setattr("mamlctl.experiments.classify.MOST_AT_ONCE", 100)
    with pytest.raises(SettingsError, match="takes all 6 images at once"):
        classify(run, support, query, settings=EvalConfig(bn="transductive"))


def test_a_run_with_running_statistics_keeps_using_them(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 1])
    assert classify(trained("maml", bn="running"), support, query).bn == "running"


@pytest.mark.parametrize("algo", ["maml++", "reptile", "protonet", "transfer"])
@pytest.mark.parametrize("bn", ["support", "running"])
def test_the_code_in_the_docs_gives_the_same_probabilities(
    algo, bn, trained, packed, tmp_path, monkeypatch, capsys
):
    """With nn.Sequential from the saved file: bnwb's last rows, adapted norms and prototypes as a layer."""
    support, query = folders(tmp_path, packed, [2, 1, 3])
    saved = tmp_path / "mine.pt"
    result = classify(trained(algo), support, query, settings=EvalConfig(bn=bn), save_adapted=saved)
    (code,) = code_blocks((DOCS / "classify-your-images.md").read_text(), "python")
    monkeypatch.chdir(tmp_path)
    for image in result.images:
        shutil.copy(image.file, "query.png")
        exec(code, {})
        printed = eval(capsys.readouterr().out)
        assert tuple(printed) == result.classes
        assert np.allclose(list(printed.values()), image.probabilities, atol=2e-5)


def test_other_networks_are_saved_with_the_names_of_their_layers(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 2])
    run = trained("maml", net="mlp", hidden="16-8", filters=64)
    classify(run, support, query, save_adapted=tmp_path / "mlp.pt")
    saved = torch.load(tmp_path / "mlp.pt", weights_only=True)
    assert {"hidden1.weight", "norm2.running_var", "linear.bias"} <= saved["weights"].keys()
    assert saved["settings"]["hidden"] == "16-8"
    events = []
    classify(trained("maml"), support, save_adapted=tmp_path / "t.pt", settings=EvalConfig(bn="transductive"))
    classify(
        trained("maml"),
        support,
        save_adapted=tmp_path / "t.pt",
        settings=EvalConfig(bn="transductive"),
        on_event=events.append,
    )
    assert "saved with the support set's statistics" in events[-1].text
    with pytest.raises(SettingsError, match="--algo nearest compares with the support images"):
        classify(trained("nearest"), support, save_adapted=tmp_path / "n.pt")


def test_a_resized_head_repeats_the_learnt_rows_and_their_rates(trained):
    state = open_state(trained("meta-sgd"))
    more, fewer = resize_head(state, 5, "head"), resize_head(state, 2, "head")
    for name in ("linear.weight", "linear.bias"):
        assert torch.equal(more.slow[name], state.slow[name][[0, 1, 2, 0, 1]])
        assert torch.equal(more.rates[name], state.rates[name][:, [0, 1, 2, 0, 1]])
        assert torch.equal(fewer.slow[name], state.slow[name][:2])
    reptile = open_state(trained("reptile"))
    moved = resize_head(reptile, 4, "head")
    assert moved.moments["linear.weight"].shape[0] == 4 and moved.rates["linear.bias"].shape == (1,)
    assert torch.equal(moved.moments["steps"], reptile.moments["steps"])


def test_images_are_converted_in_colour_size_and_transparency(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 2])
    plain = table(classify(trained("maml"), support, query))
    for file in [*support.rglob("*.png"), *query.rglob("*.png")]:
        image = Image.open(file).convert("L")
        black = Image.new("L", image.size, 0)
        Image.merge("RGBA", [black, black, black, image.point(lambda value: 255 - value)]).save(file)
    assert np.allclose(table(classify(trained("maml"), support, query)), plain, atol=1e-6)
    Image.open(file).resize((61, 40)).save(tmp_path / "odd.png")
    assert table(classify(trained("maml"), support, tmp_path / "odd.png")).shape == (1, 2)


def test_inverted_images_are_reported(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 2])
    events = []
    classify(trained("maml"), support, query, on_event=events.append)
    assert not [event for event in events if isinstance(event, Notice)]
    for file in support.rglob("*.png"):
        Image.fromarray(255 - np.array(Image.open(file))).save(file)
    classify(trained("maml"), support, query, on_event=events.append)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert "but glyphs has 0.8" in notice and "dark on white, so invert yours" in notice
    for file in support.rglob("*.png"):
        image = np.array(Image.open(file)) // 3 + 110  # grey on a darker grey: brightness near 0.5
        Image.fromarray(image.astype(np.uint8)).save(file)
    events.clear()
    classify(trained("maml"), support, query, on_event=events.append)
    assert not [event for event in events if isinstance(event, Notice)]


def test_support_classes_with_folders_are_noticed(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 2])
    for folder in support.iterdir():
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (tmp_path / "moved").rename(folder / "inside")
    events = []
    classify(trained("maml"), support, query, on_event=events.append)
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    assert (
        notice == f"the classes are the 2 top folders of {support}, each with the images of all its folders"
    )


def test_unreadable_images_are_listed_and_copies_reported(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 2])
    (support / "ant" / "bad.png").write_bytes(b"no image")
    (query / "bee" / "bad.png").write_bytes(b"no image")
    (query / "notes.txt").write_text("passed over")
    shutil.copy(support / "bee" / "x00.png", support / "bee" / "copy.png")
    shutil.copy(support / "bee" / "x00.png", query / "learned.png")
    events = []
    result = classify(trained("maml"), support, query, query / "learned.png", on_event=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert any("left out: cannot read image" in text for text in notices)
    assert "support files that are copies of others and count too: 1" in notices
    assert "query files that are given twice and count once: 1" in notices
    assert "query images that are also in the support set, which flatters the accuracy: 1" in notices
    assert (result.left_out, result.unreadable, result.labelled, len(result.images)) == (1, 1, 4, 6)
    # Files are in the order of their names, with those of a folder before those of its class folders.
    assert [Path(image.file).name for image in result.images][:2] == ["learned.png", "x00.png"]
    (bad,) = [image for image in result.images if image.predicted is None]
    assert bad.label == "bee" and "not an image of a supported format" in bad.problem


def test_queries_may_be_files_folders_and_class_folders(packed, tmp_path):
    _, query = folders(tmp_path, packed, [1, 1])
    classes = ("ant", "bee")
    queries, twice = find_queries([query], classes)
    assert [example.label for example in queries] == ["ant", "ant", "bee", "bee"] and twice == 0
    flat, _ = find_queries([query / "ant"], classes)
    assert [example.label for example in flat] == [None, None]
    both, twice = find_queries([query / "ant", query], classes)
    assert [example.label for example in both] == ["ant", "ant", "bee", "bee"] and twice == 2
    with pytest.raises(DataError, match="query folder 'ant' of") as caught:
        find_queries([query], ("bee", "cow"))
    assert f"--query {query / 'ant'}" in caught.value.hint
    for wrong in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError):
            find_queries([tmp_path / wrong], classes)


def test_the_interval_solves_the_equation_of_wilson():
    """Compare with the roots of (p - s)^2 = z^2 s (1 - s) / n."""
    for right, total in ((0, 5), (20, 20), (7, 12), (1, 1000)):
        low, high = wilson95(right, total)
        z, p = 1.959964, right / total
        roots = sorted(np.roots([1 + z * z / total, -(2 * p + z * z / total), p * p]))
        assert (low, high) == pytest.approx(tuple(roots), abs=1e-9)


def test_the_command_writes_a_table_a_document_a_csv_and_pictures(cli, trained, packed, tmp_path):
    run = trained("maml++")
    support, query = folders(tmp_path, packed, [2, 1, 2])
    (query / "bee" / "bad.png").write_bytes(b"no image")
    words = ("eval", run, "--support", support, "--query", query)
    code, out, _ = cli(*words)
    assert code == 0
    assert "3 classes, 1 to 2 support images each; the learnt head; 5 inner steps, bn support" in out
    assert "maml++ (best, epoch 1)" in out
    assert re.search(r"accuracy \d+\.\d %: \d of 6 \(95 % interval .*, Wilson\); chance: 33.3 %", out)
    assert "left out: 1 of 7 query images" in out and "bad.png: not an image of a supported format" in out
    assert str(query / "ant" / "x00.png") in out  # full paths, because stdout is not a terminal
    extra = ("--plot", "--csv", tmp_path / "o.csv", "--json", "--quiet")
    code, out, err = cli(*words, *extra)
    printed = json.loads(out)
    assert (code, err, printed["labelled"], printed["unreadable"]) == (0, "", 6, 1)
    assert printed["accuracy"] == printed["right"] / 6 and len(printed["wilson95"]) == 2
    for entry in printed["predictions"]:
        if entry["problem"]:
            assert entry["predicted"] is None and entry["probability"] is None
        else:
            assert entry["probability"] == max(entry["probabilities"].values())
            assert entry["probabilities"][entry["predicted"]] == entry["probability"]
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] or None for row in rows] == [
        entry["predicted"] for entry in printed["predictions"]
    ]
    assert [row["label"] for row in rows] == ["ant"] * 2 + ["bee"] * 3 + ["cow"] * 2
    with Image.open(printed["pictures"][0]) as picture:
        assert picture.width > 800
    assert Path(printed["pictures"][1]).suffix == ".svg"


def test_a_name_that_a_spreadsheet_would_run_gets_an_apostrophe_in_the_csv(tmp_path):
    images = [ClassifiedImage("=x.png", "-b", (0.25, 0.75), "@c"), ClassifiedImage("y.png", problem="+")]
    _write_csv(tmp_path / "o.csv", images)
    with (tmp_path / "o.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    assert rows == [["'=x.png", "'-b", "0.750000", "'@c", ""], ["y.png", "", "", "", "'+"]]


def test_the_contact_sheet_frames_predictions_and_shows_the_first_ones():
    support = [("a", np.zeros((12, 1, 8, 8))), ("b" * 40, np.zeros((1, 3, 8, 8), np.uint8))]
    rights = [True, False, None] * 25
    queries = [contact_sheet.QueryPicture(np.ones((1, 8, 8)), "a", 0.75, right) for right in rights]
    ax = contact_sheet.sheet(support, queries, 75, "run").axes[0]
    assert len(ax.images) == contact_sheet.SUPPORT_SHOWN + 1 + contact_sheet.SHOWN
    edges = [matplotlib.colors.to_hex(patch.get_edgecolor()).upper() for patch in ax.patches]
    assert (edges.count(GREEN), edges.count(RED)) == (20, 20)
    texts = [text.get_text() for text in ax.texts]
    assert "and 2 more" in texts and texts.count("75 %") == contact_sheet.SHOWN
    assert any(text.startswith("Queries (the first 60 of 75)") for text in texts)


def test_query_takes_all_files_of_a_shell_glob(cli, trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [2, 1])
    files = sorted((query / "ant").glob("*.png"))
    code, out, _ = cli("eval", trained("maml"), "--support", support, "--json", "--query", *files)
    printed = json.loads(out)
    assert code == 0 and len(printed["predictions"]) == 2
    assert printed["accuracy"] is None and printed["wilson95"] is None


def broken(tmp_path, packed, what):
    """Folders with one problem."""
    support, query = folders(tmp_path / what, packed, [1, 1])
    if what == "empty class":
        (support / "cow").mkdir()
    elif what == "corrupt class":
        (support / "bee" / "x00.png").write_bytes(b"no image")
    elif what == "one class":
        shutil.rmtree(support / "bee")
    elif what == "all corrupt":
        for file in query.rglob("*.png"):
            file.write_bytes(b"no image")
    elif what == "strange class":
        (query / "ant").rename(query / "yak")
    return support, query


@pytest.mark.parametrize(
    ("what", "fact", "hint"),
    [
        ("empty class", "class 'cow' of", "add one, or remove the folder"),
        ("corrupt class", "has no readable image: cannot read image", "add one"),
        ("one class", "contains 1 class folder, but at least 2 are needed", "a separate folder"),
        ("all corrupt", "no query image can be read (4 given): ", "such as PNG"),
        ("strange class", "query folder 'yak' of", "one of ant, bee"),
    ],
)
def test_invalid_folders_are_reported_in_two_lines(what, fact, hint, cli, trained, packed, tmp_path):
    support, query = broken(tmp_path, packed, what)
    code, out, err = cli("eval", trained("maml"), "--support", support, "--query", query, "--quiet")
    assert_two_lines(err, fact, hint)
    assert (code, out) == (3, "")


@pytest.mark.parametrize(
    ("words", "fact", "hint"),
    [
        ("--support {learn}", "--support has no effect alone", "add --query, or --save-adapted FILE"),
        ("--support {learn} --save-adapted a.pt --plot", "--plot has no effect without --query", "leave it"),
        ("--query {ask}", "--query has no effect without --support", "add --support DIR"),
        ("--csv a.csv", "--csv has no effect without --support", "add --support DIR"),
        ("--save-adapted a.pt", "--save-adapted has no effect without --support", "add --support DIR"),
        ("{ask}", "eval takes one run", "one run at a time"),
        ("--support {learn} --query {ask} --tasks 9", "--tasks has no effect with --support", "leave it out"),
        ("--support {learn} --query {ask} --split val", "--split has no effect with", "leave it out"),
        ("--support {learn} --query {ask} --queries 2", "--queries has no effect with", "leave it out"),
        ("--support {learn} --query {ask} --eval-seed 2", "--eval-seed has no effect", "leave it out"),
        ("--support {learn} --query {ask} --data-root x", "--data-root has no effect", "leave it out"),
        ("--support {learn} --query {ask} --beside x", "--beside is for test tasks", "leave it out"),
    ],
)
def test_options_without_effect_are_refused(words, fact, hint, cli, trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 1])
    filled = words.format(learn=support, ask=query).split()
    code, _, err = cli("eval", trained("maml"), *filled, "--quiet")
    assert_two_lines(err, fact, hint)
    assert code == 2


def test_runs_on_curves_and_missing_folders_are_refused(cli, trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 1])
    code, _, err = cli("eval", trained("maml"), "--support", tmp_path / "no", "--query", query)
    assert_two_lines(err, "is not a folder", "one folder per class")
    assert code == 3
    values = {"dataset": "line", "epochs": 1, "steps_per_epoch": 1, "val_tasks": 2}
    config = resolve_settings([("flag", values)]).config
    where = {"out": tmp_path / "run", "offline": True, "time_limit_s": None}
    train(config, **where, command="test", on_event=ignore)
    code, _, err = cli("eval", tmp_path / "run", "--support", support, "--query", query)
    assert_two_lines(err, "the run was trained on line, which has curves", "a run that was trained on images")
    assert code == 2


def assert_two_lines(err, fact, hint):
    lines = err.strip().splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ") and fact in lines[0]
    assert lines[1].startswith("hint:  ") and hint in lines[1]


def test_the_document_has_the_probability_of_every_class(trained, packed, tmp_path):
    support, query = folders(tmp_path, packed, [1, 1])
    described = document(classify(trained("protonet"), support, query))
    assert described["support"] == {"ant": 1, "bee": 1} and described["head"].startswith("prototypes")
    assert all(set(entry["probabilities"]) == {"ant", "bee"} for entry in described["predictions"])


def test_mini_batches_are_drawn_from_all_support_images(trained, packed, tmp_path):
    """For a run with mini-batches: from unequal classes, and the same ones each time."""
    run = trained("reptile", eval_inner_batch=2)
    support, query = folders(tmp_path, packed, [1, 3, 1, 2])
    one, two = (table(classify(run, support, query)) for _ in range(2))
    assert np.array_equal(one, two) and one.shape == (8, 4)
    assert not np.allclose(one, table(classify(trained("reptile"), support, query)), atol=1e-4)

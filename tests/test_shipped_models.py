"""The models that ship with the package: their files, their receipts, and their use by name."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.shared import ignore
from PIL import Image
from records.experiments import experiments
from records.models import MODELS, RECEIPT
from records.receipts import FOLDER as RECEIPTS
from records.receipts import problems, receipt_file

from mamlctl import shipped_models
from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.data.sets import glyphs
from mamlctl.run_folder import open_run, run_state
from mamlctl.shipped_models import BEST, FOLDER, local_run, model_names, refuse_model

MEGABYTES = 3
COPIES = Path("runs", "models")


@pytest.fixture
def document_of(cli, monkeypatch, tmp_path):
    """A function that calls a command in an empty folder and returns the JSON that it prints."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code, out, _ = cli(*words, "--json")
        assert code == 0
        return json.loads(out)

    return call


def test_the_models_are_those_of_the_record_and_small():
    assert model_names() == sorted(MODELS)
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MEGABYTES * 10**6
    for name, (experiment, seed) in MODELS.items():
        receipt = json.loads((FOLDER / name / RECEIPT).read_text())
        (chosen,) = experiments(only=experiment)
        assert problems(receipt, chosen) == [], f"run python -m records.models: {name} is outdated"
        run = open_run(FOLDER / name)
        assert run.dataset_digest == receipt["data_digest"]
        assert (run.config.seed, run_state(run.path).status) == (seed, "finished")
        assert receipt == json.loads(receipt_file(chosen, seed, RECEIPTS).read_text())
        assert (run.config.ways, run.config.shots) == (chosen.config.ways, chosen.config.shots)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.realdata
def test_a_model_has_the_accuracy_of_its_receipt(name, omniglot_root, document_of):
    document = document_of("eval", name, "--tasks", 60, "--queries", 1, "--data-root", omniglot_root)
    result = document["results"][0]
    assert document["run"] == str(COPIES / name)
    receipt = json.loads((FOLDER / name / RECEIPT).read_text())
    expected = receipt["tests"][0]["results"][0]
    assert (expected["kind"], expected["bn"], result["tasks"]) == ("best", "transductive", 60)
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=2.5 * result["ci95"])


def test_a_model_classifies_images_without_any_data(document_of, glyphs_root):
    packed = glyphs.open_pack(glyphs_root, on_event=ignore)
    for label in range(5):
        for place, folder in enumerate(("learn", "ask")):
            Path(folder, str(label)).mkdir(parents=True)
            image = packed.images_MCHW[packed.starts[label] + place, 0]
            Image.fromarray(image).save(Path(folder, str(label), "image.png"))
    document = document_of("eval", "omniglot-5w1s", "--support", "learn", "--query", "ask", "--offline")
    assert len(document["predictions"]) == 5
    assert sorted(path.name for path in Path().iterdir()) == ["ask", "learn", "runs"]


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A package with one model, as seen from an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped_models, "FOLDER", tmp_path / "package")
    model = tmp_path / "package" / "small"
    (model / BEST).parent.mkdir(parents=True)
    (model / BEST).write_bytes(b"weights")
    (tmp_path / "package" / "other").mkdir()  # not a model
    return tmp_path / "package"


def test_a_name_stands_for_a_copy_under_runs(models):
    assert model_names() == ["small"]
    assert local_run(Path("other")) == Path("other")
    assert local_run(Path("small")) == COPIES / "small"
    (COPIES / "small" / "eval").mkdir()
    assert local_run(Path("small")) == COPIES / "small"
    assert sorted(path.name for path in (COPIES / "small").iterdir()) == ["checkpoints", "eval"]
    assert [path.name for path in COPIES.iterdir()] == ["small"]


def test_an_existing_path_wins_over_a_name(models):
    Path("small").mkdir()
    assert local_run(Path("small")) == Path("small")
    assert not COPIES.exists()


@pytest.mark.parametrize("file", [BEST, Path("config.yaml")])
def test_a_copy_of_another_version_is_not_used(models, file):
    (models / "small" / "config.yaml").write_text("ways: 5")
    local_run(Path("small"))
    (models / "small" / file).write_bytes(b"better weights")
    with pytest.raises(MamlctlError, match="is not this version of the model small") as caught:
        local_run(Path("small"))
    assert caught.value.hint == "rename or remove that folder"
    shutil.rmtree(COPIES / "small")
    assert (local_run(Path("small")) / file).read_bytes() == b"better weights"
    (COPIES / "small" / file).unlink()
    with pytest.raises(MamlctlError, match="is not this version of the model small"):
        local_run(Path("small"))


def test_a_model_of_a_read_only_package_has_a_copy_that_can_be_written(models):
    for path in (models / "small", *(models / "small").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    copy = local_run(Path("small"))
    assert all(path.stat().st_mode & 0o200 for path in (copy, *copy.rglob("*")))
    for path in (models / "small", models / "small" / "checkpoints"):
        path.chmod(0o755)


def test_two_processes_can_copy_a_model_at_once(models, monkeypatch):
    def overtaken(source, target):
        target.write_bytes(source.read_bytes())
        (COPIES / "small" / "checkpoints").mkdir(parents=True)
        (COPIES / "small" / BEST).write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", overtaken)
    assert local_run(Path("small")) == COPIES / "small"
    assert [path.name for path in COPIES.iterdir()] == ["small"]


def test_a_misspelt_name_gets_a_hint_and_a_path_does_not(models):
    with pytest.raises(MamlctlError, match="there is no run folder or model small2") as caught:
        local_run(Path("small2"))
    assert caught.value.hint == "did you mean 'small'?"
    assert local_run(Path("runs/small2")) == Path("runs/small2")


def test_the_name_of_a_model_is_refused_for_training(models):
    refuse_model(Path("other"))
    with pytest.raises(SettingsError, match="small is a model that ships with mamlctl"):
        refuse_model(Path("small"))
    copy = local_run(Path("small"))
    with pytest.raises(SettingsError, match="runs/models/small is a model that ships with mamlctl"):
        refuse_model(copy)
    (copy / BEST.with_name("last.pt")).touch()  # a run of this name
    refuse_model(copy)

"""Every option that takes a path expands `~`, which a shell does not do after '='."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.grid_cases import QUICK_WORDS
from PIL import Image


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(Path(shutil.os.sep))
    return tmp_path


def test_train_resume_eval_and_compare_find_their_folders(cli, home, glyphs_root):
    place = f"--data-root={glyphs_root}"
    assert cli("train", *QUICK_WORDS, place, "--out=~/run")[0] == 0
    assert cli("train", "--resume=~/run", "--out=~/run", "--json")[0] == 0
    assert cli("eval", "~/run", "--tasks=4", "--checkpoint=~/run/checkpoints/best.pt")[0] == 0
    assert cli("compare", "~/run", "--tasks=4", "--out=~/table")[0] == 0
    assert (home / "table" / "report.html").is_file()
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    for name, image in zip(("ant", "bee"), images, strict=True):
        (home / "images" / name).mkdir(parents=True)
        Image.fromarray(image).save(home / "images" / name / "0.png")
    files = ["--csv=~/found.csv", "--save-adapted=~/adapted.pt"]
    assert cli("eval", "~/run", "--support=~/images", "--query=~/images", *files)[0] == 0
    assert (home / "found.csv").is_file()
    assert (home / "adapted.pt").is_file()


def test_a_file_of_settings_is_found(cli, home):
    (home / "settings.yaml").write_text("ways: 7\n")
    code, out, _ = cli("train", "--print-config", "--config=~/settings.yaml")
    assert code == 0
    assert "ways: 7 " in out


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "~/missing"],
        ["compare", "~/missing"],
        ["train", "--resume=~/missing"],
        ["train", "--config=~/missing"],
        ["train", "--dataset=~/missing"],
        ["ablate", "--resume=~/missing"],
        ["fetch", "omniglot", "--from=~/missing"],
    ],
)
def test_errors_name_the_expanded_path(cli, home, words):
    code, _, err = cli(*words)
    assert code in (1, 2, 3)
    assert f"{home}/missing" in err
    assert "~" not in err.replace("--from", "").split("hint:")[0]


@pytest.mark.parametrize("words", [["eval", "~nobody-here/x"], ["train", "--data-root=~nobody-here/x"]])
def test_an_unknown_home_is_an_error_of_two_lines(cli, home, words):
    code, _, err = cli(*words)
    assert code in (1, 2, 3)
    assert "Traceback" not in err

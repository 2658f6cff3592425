"""`--fail-under` and `--fail-over` as a user calls them: exit codes, and the result that is still there."""

import json
import sys

import pytest
from helpers import preloaded
from helpers.grid_cases import QUICK_WORDS

from mamlctl.cli.app import main

CURVES = (
    "--dataset sinusoid --engine adjoint --meta-batch-size 2 --epochs 1 --steps-per-epoch 2 --val-tasks 4"
)


def train(*words):
    """Train in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["mamlctl", "train", "--quiet", *map(str, words)])
        main()
    return int(left.value.code or 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory, glyphs_root):
    """A run of six meta-steps on images."""
    run = tmp_path_factory.mktemp("runs") / "images"
    assert train(*QUICK_WORDS, "--data-root", glyphs_root, "--out", run) == 0
    return run


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """A run of two meta-steps on curves."""
    run = tmp_path_factory.mktemp("runs") / "curves"
    assert train(*CURVES.split(), "--out", run) == 0
    return run


def test_eval_prints_and_writes_the_result_before_it_fails(cli, images):
    code, out, err = cli("eval", images, "--tasks", 12, "--fail-under", 99.9, "--json")
    document = json.loads(out)
    accuracy = document["results"][0]["accuracy"]
    assert (code, len(out.splitlines())) == (1, 1)
    fact, hint = err.splitlines()[-2:]
    assert fact == f"error: {images} has {100 * accuracy:.2f} %, but the limit is --fail-under 99.9 %"
    assert hint.startswith("hint:  train longer")
    stored = json.loads(
        (images / "eval" / document["folder"].rpartition("/")[2] / "summary.json").read_text()
    )
    assert stored["results"][0]["accuracy"] == accuracy
    code, table, _ = cli("eval", images, "--tasks", 12, "--fail-under", 100 * accuracy)
    assert code == 0
    assert "best" in table


def test_eval_judges_the_best_model_even_if_the_ensemble_is_better(cli, images):
    code, out, err = cli("eval", images, "--tasks", 12, "--json", "--models", "best", "--fail-under", 100)
    assert code == 1
    assert [row["kind"] for row in json.loads(out)["results"]] == ["best"]
    code, out, err = cli("eval", images, "--models", "ensemble", "--fail-under", 30)
    assert (code, out) == (2, "")
    assert "which --models ensemble leaves out\nhint:  use --models best or all" in err


def test_eval_fails_over_an_error_of_curves(cli, curves):
    words = ["eval", curves, "--tasks", 4, "--quiet"]
    code, out, err = cli(*words, "--fail-over", 1e-6)
    assert (code, err.count("\n")) == (1, 2)
    assert "mean squared error" in out
    assert "but the limit is --fail-over 1e-06\nhint:" in err
    assert cli(*words, "--fail-over", 1e6)[0] == 0


def test_a_run_that_diverged_fails_whatever_its_score(cli, tmp_path, glyphs_root):
    run = tmp_path / "run"
    words = [*QUICK_WORDS, "--meta-lr", "1e30", "--clip-norm", "1e30", "--data-root", glyphs_root]
    assert train(*words, "--out", run) == 4
    code, out, err = cli("eval", run, "--tasks", 6, "--fail-under", 1)
    assert code == 1
    assert "best" in out or "last" in out
    assert f"error: {run} diverged at meta-step " in err


@pytest.mark.parametrize(("format_", "beginning"), [("--json", "{"), ("--csv", "label,"), ("--quiet", "")])
def test_compare_prints_and_writes_the_table_before_it_fails(cli, images, tmp_path, format_, beginning):
    out_folder = tmp_path / "out"
    words = ["compare", images, "--tasks", 12, format_, "--out", out_folder, "--fail-under"]
    with preloaded.without_pictures():
        code, out, err = cli(*words, 99.9)
    assert code == 1
    assert out.startswith(beginning)
    assert "maml" in out
    assert (out_folder / "table.csv").is_file()
    assert "maml has " in err
    assert " %, but the limit is --fail-under 99.9 %\n" in err


def test_compare_passes_and_refuses_the_option_of_other_data(cli, images, curves):
    assert cli("compare", images, "--tasks", 12, "--fail-under", 1)[0] == 0
    assert cli("compare", curves, "--tasks", 4, "--fail-over", 1e6)[0] == 0
    code, out, err = cli("compare", curves, "--tasks", 4, "--fail-under", 90)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "error: --fail-under has no effect on sinusoid, whose score is a mean squared error",
        "hint:  use --fail-over",
    ]


REFUSED = [
    ("eval IMAGES --fail-over 0.5", "--fail-over has no effect on glyphs, whose score is an accuracy"),
    ("eval CURVES --fail-under 90", "--fail-under has no effect on sinusoid, whose score is a mean squared"),
    ("eval IMAGES --fail-under 0.95", "--fail-under is 0.95, which is not a percentage from 1 to 100"),
    ("eval IMAGES --fail-under 101", "--fail-under is 101, which is not a percentage from 1 to 100"),
    ("eval IMAGES --fail-under nan", "--fail-under is nan, which is not a percentage from 1 to 100"),
    ("eval IMAGES --fail-under x", "--fail-under is 'x', which is not a number"),
    ("eval CURVES --fail-over 0", "--fail-over is 0, which is not a positive number"),
    ("eval CURVES --fail-over inf", "--fail-over is inf, which is not a positive number"),
    ("eval IMAGES --support a --query b --fail-under 90", "--fail-under has no effect with --support"),
    ("compare IMAGES --fail-under 950", "--fail-under is 950, which is not a percentage"),
    ("ablate --dataset glyphs --fail-over 0.5", "--fail-over has no effect on glyphs"),
    (
        "ablate --dataset sinusoid --grid meta_lr=0.1 --fail-under 90",
        "--fail-under has no effect on sinusoid",
    ),
    ("ablate --dataset glyphs --fail-under 0", "--fail-under is 0, which is not a percentage"),
    ("ablate --dataset glyphs --dry-run --fail-under 90", "--fail-under has no effect with --dry-run"),
    (
        "compare --algos maml --dataset glyphs --slurm --fail-under 9",
        "--fail-under has no effect with --slurm",
    ),
]


@pytest.mark.parametrize(("line", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_a_limit_that_does_not_fit_is_refused_before_work_starts(
    cli, images, curves, tmp_path, monkeypatch, line, fact
):
    monkeypatch.chdir(tmp_path)
    named = {"IMAGES": images, "CURVES": curves}
    code, out, err = cli(*(named.get(word, word) for word in line.split()))
    assert (code, out) == (2, "")
    (error, hint) = err.splitlines()
    assert error.startswith(f"error: {fact}")
    assert hint.startswith("hint:  ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_ablate_fails_for_a_row_below_the_limit_or_diverged(cli, tmp_path, glyphs_root, monkeypatch):
    """The table of both rows is printed and written; the second call only reads it again."""
    monkeypatch.setattr(sys, "executable", preloaded.python())
    monkeypatch.setenv(preloaded.NO_PICTURES, "1")
    words = [*QUICK_WORDS, "--seeds", 1, "--tasks", 12, "--data-root", glyphs_root]
    words = ["ablate", *words, "--grid", "inner_lr=0.1,1e30", "--out", tmp_path / "out", "--json"]
    with preloaded.without_pictures():
        code, out, err = cli(*words, "--fail-under", 99.9)
        assert code == 1
        assert [row["best"] is None for row in json.loads(out)["rows"]] == [False, True]
        assert "error: 2 of 2 rows do not reach --fail-under 99.9 %\n  inner_lr=0.1 has " in err
        assert "\n  inner_lr=1e30 diverged with seed 0 at meta-step 1\nhint:" in err
        code, _, err = cli(*words, "--fail-under", 1)
        assert code == 1
        assert "error: inner_lr=1e30 diverged with seed 0 at meta-step 1, but the limit is" in err
        assert "--fail-under" not in (tmp_path / "out" / "plan.yaml").read_text()
        assert cli(*words)[0] == 0

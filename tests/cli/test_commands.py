"""Every command as a user calls it: arguments in, streams and exit code out."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import preloaded
from helpers.shared import ignore

import mamlctl
from mamlctl.cli.app import main
from mamlctl.cli.grid_actions import grid_command
from mamlctl.core.errors import is_out_of_memory
from mamlctl.data.reading.packs import load_pack, pack, save_pack
from mamlctl.experiments.grid.stored_evaluations import find_evaluation
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.run_folder import open_run
from mamlctl.settings.evaluation import EvalConfig

QUICK = """
--dataset glyphs --ways 3 --filters 4 --inner-steps 2 --meta-batch-size 2 --epochs 2 --steps-per-epoch 3
--val-tasks 6
"""
QUICK_WORDS = QUICK.split()
PROMISED = """
--algo --dataset --ways --shots --queries --inner-steps --inner-lr --meta-lr --meta-batch-size --epochs
--steps-per-epoch --val-tasks --seed --device --precision --bn --out --resume --preset --config --set
--print-config --data-root --time-limit --offline --json --quiet --split-scheme --rotations
--msl --no-msl --da --no-da --bnrs --no-bnrs --bnwb --no-bnwb --lslr --no-lslr --ca --no-ca
"""
COMMANDS = ["fetch", "train", "eval", "compare", "ablate"]


@pytest.fixture
def cli(cli, glyphs_root):
    """The same function; the commands that need a data root get one."""

    def call(*words, data_root=glyphs_root):
        if words[0] in {"train", "eval", "fetch"} and "--help" not in words and "--data-root" not in words:
            words = (*words, "--data-root", data_root)
        return cli(*words)

    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory, glyphs_root):
    """A run of six meta-steps, trained from the command line."""
    run = tmp_path_factory.mktemp("runs") / "quick"
    words = ["train", *QUICK_WORDS, "--out", run, "--data-root", glyphs_root]
    subprocess.run([*program(), *words], check=True, capture_output=True)
    return run


def program():
    return [preloaded.python(), "-m", "mamlctl"]


def assert_two_lines(err, fact, hint):
    """Check that stderr is exactly a line with the fact and a line with the hint."""
    lines = err.strip().splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert fact in lines[0]
    assert lines[1].startswith("hint:  ")
    assert hint in lines[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_exit_code_0(cli, command):
    code, out, err = cli(command, "--help")
    assert code == 0
    assert f"mamlctl {command}" in out.replace("python -m ", "")
    assert err == ""


def test_the_bare_command_prints_help(cli, capsys, monkeypatch):
    code, out, _ = cli("--help")
    assert code == 0
    monkeypatch.setattr(sys, "argv", ["mamlctl"])
    with pytest.raises(SystemExit):
        main()
    bare = capsys.readouterr()
    assert (bare.out.strip(), bare.err) == (out.strip(), "")
    assert all(command in out for command in COMMANDS)
    assert cli("--version")[:2] == (0, f"mamlctl {mamlctl.__version__}\n")


def test_help_of_train_has_its_panels_and_every_promised_flag(cli):
    _, out, _ = cli("train", "--help-all")
    for panel in ("Episode", "Inner loop", "Meta-optimiser", "MAML++", "Hardware", "Output"):
        assert f"\n\n{panel}\n  --" in out
    words = set(re.findall(r"--[a-z-]+", out))
    promised = set(PROMISED.split())
    assert promised <= words, promised - words


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("file", "is a file"),
        ("file/x", "is a file"),
        ("link", "is a file"),
        ("x" * 300, "File name too long"),
        ("/proc/x", "No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", ["train", "ablate", "compare"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    cli, trained, tmp_path, monkeypatch, command, out, why
):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    for name in ("train.prepare", "grid.ablate.check_data", "grid.compare.compare"):
        monkeypatch.setattr(f"mamlctl.experiments.{name}", None)
    words = [trained, other] if command == "compare" else QUICK_WORDS
    code, stdout, err = cli(command, *words, "--out", tmp_path / out)
    assert (code, stdout) == (1, "")
    assert_two_lines(err, why, "that can be read and written" if command != "ablate" else "choose a")


def test_resuming_says_which_reports_are_lost(cli, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    fact = f"{run}/metrics.jsonl has {{}} of 2 validations before meta-step 6"
    assert fact.format(1) in cli("train", "--resume", run)[2]
    (run / "metrics.jsonl").unlink()
    assert fact.format(0) in cli("train", "--resume", run)[2]
    shutil.copy(trained / "metrics.jsonl", run)
    assert "metrics" not in cli("train", "--resume", run)[2]


def test_train_writes_a_complete_run_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml",
        "command.txt",
        "environment.json",
        "lock",
        "status.json",
        "metrics.jsonl",
        "checkpoints",
        "classes.json",
        "training_images.bin",
    }
    status = json.loads((trained / "status.json").read_text())
    assert (status["status"], status["step"]) == ("finished", 6)
    environment = json.loads((trained / "environment.json").read_text())
    assert {"python", "torch", "cuda", "git", "dataset_digest", "seeds"} <= environment.keys()
    assert environment["metrics_version"] == 1
    assert environment["seeds"] == {"init": 0, "train": 0, "split": 0, "eval": 0}
    assert (trained / "command.txt").read_text().startswith("mamlctl train --dataset glyphs")


def test_training_prints_one_plain_line_per_report_without_a_terminal(cli, tmp_path):
    code, out, err = cli("train", *QUICK_WORDS, "--out", tmp_path / "run")
    assert code == 0
    assert "\x1b" not in out + err
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert len(lines) == 4, "steps 1, 3, 5 and 6"
    assert "mamlctl eval" in out


def test_train_json_is_one_document(cli, tmp_path):
    code, out, err = cli("train", *QUICK_WORDS, "--out", tmp_path / "run", "--json", "--quiet")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["format"] == 1
    assert document["result"]["status"] == "finished"
    assert document["result"]["step"] == 6


def test_eval_json_is_the_documented_object(cli, trained):
    words = "eval", trained, "--split", "test", "--tasks", "9", "--json"
    code, out, _ = cli(*words, "--per-step")
    assert code == 0
    document = json.loads(out)
    best, ensemble = document["results"]
    assert (best["model"], ensemble["model"]) == ("best", "ensemble-2")
    for row in (best, ensemble):
        assert {"accuracy", "ci95", "tasks", "split", "bn", "per_step"} <= row.keys()
        assert (row["tasks"], row["split"], row["bn"]) == (9, "test", "transductive")
        assert len(row["per_step"]) == 3
        assert row["per_step"][-1] == row["accuracy"] and row["per_step_tasks"] == 9
    folder = Path(document["folder"])
    assert folder.parent == trained / "eval"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["results"] == document["results"]
    lines = (folder / "tasks.csv").read_text().splitlines()
    assert lines[0] == "task,best,ensemble-2"
    assert len(lines) == 10
    mean = sum(float(line.split(",")[1]) for line in lines[1:]) / 9
    assert mean == pytest.approx(best["accuracy"], abs=1e-5)
    absent = {"per_step": [], "per_step_ci95": [], "per_step_tasks": 0}
    last_steps = json.loads(cli(*words)[1])["results"]
    assert last_steps == [row | absent for row in document["results"]]
    assert json.loads(cli(*words, "--models", "best")[1])["results"] == last_steps[:1]


def test_eval_refuses_a_number_of_tasks_to_score_per_step_without_per_step(cli, trained):
    code, out, err = cli("eval", trained, "--tasks", "9", "--per-step-tasks", "4")
    assert (code, out) == (2, "")
    assert "error: --per-step-tasks has no effect without --per-step\nhint:  add --per-step\n" in err


def test_eval_depends_only_on_its_settings(cli, trained):
    one, two = (cli("eval", trained, "--tasks", "9", "--json")[1] for _ in range(2))
    assert one == two
    modes = {
        bn: json.loads(cli("eval", trained, "--tasks", "30", "--bn", bn, "--json")[1])["results"][0]
        for bn in ("transductive", "running", "support")
    }
    assert {bn: row["bn"] for bn, row in modes.items()} == {bn: bn for bn in modes}
    assert len({row["accuracy"] for row in modes.values()}) > 1


def test_eval_table_names_both_rows_and_the_protocol(cli, trained):
    code, out, _ = cli("eval", trained, "--tasks", "9")
    assert code == 0
    for word in ("best", "ensemble-2", "±", "transductive", "9"):
        assert word in out


def test_eval_accepts_other_numbers_of_inner_steps(cli, trained):
    for steps in (1, 4):
        row = json.loads(
            cli("eval", trained, "--tasks", "4", "--inner-steps", steps, "--per-step", "--json")[1]
        )["results"][0]
        assert len(row["per_step"]) == steps + 1


def test_print_config_shows_values_and_origins(cli, tmp_path):
    code, out, _ = cli("train", "--preset", "demo", "--ways", "7", "--no-lslr", "--print-config")
    assert code == 0
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert lines["ways"].split() == ["7", "#", "flag"]
    assert lines["dataset"].split() == ["glyphs", "#", "preset", "demo"]
    assert lines["msl"].split() == ["true", "#", "algorithm", "maml++"]
    assert lines["lslr"].split() == ["false", "#", "flag"]
    assert lines["init_seed"].split() == ["null", "#", "derived:", "0"]
    (tmp_path / "again.yaml").write_text(out)
    code, again, _ = cli("train", "--config", tmp_path / "again.yaml", "--print-config")
    assert code == 0
    assert dict(line.split(":", 1) for line in again.splitlines())["ways"].split()[0] == "7"


BAD = [
    (
        "train --ways 50 --dataset glyphs",
        2,
        "glyphs 'val' has 40 classes, but --ways is 50",
        "--ways 40 or fewer",
    ),
    (
        "train --dataset glyphs --shots 15 --queries 10",
        2,
        "--shots 15 + --queries 10 is 25",
        "sum to 20 or fewer",
    ),
    ("train --dataset glyphs --preset omniglot-20w1s", 2, "unknown preset 'omniglot-20w1s'", "did you mean"),
    ("train --dataset glyphs --algo mamml", 2, "unknown algorithm 'mamml'", "did you mean"),
    ("train --dataset glyps", 2, "unknown data set 'glyps'", "did you mean 'glyphs'"),
    (
        "train --dataset glyphs --set inner_stesp=3",
        2,
        "unknown setting 'inner_stesp'",
        "did you mean 'inner_steps'",
    ),
    ("train --dataset glyphs --device gpu", 2, "unknown device 'gpu'", "auto, cpu, cuda"),
    ("train --dataset glyphs --device cuda:7", 2, "CUDA devices", "--device cpu"),
    (
        "train --dataset glyphs --algo maml --da-epochs 3",
        2,
        "--da-epochs has no effect without --da",
        "add --da",
    ),
    ("train --dataset glyphs --precision tf32 --device cpu", 2, "no effect on a CPU", "float32"),
    ("train --dataset glyphs --split-scheme lake", 2, "glyphs has no --split-scheme 'lake'", "own"),
    ("train --dataset glyphs --time-limit soon", 2, "'soon' is not a duration", "9m"),
    (
        "train --dataset glyphs --ways x",
        2,
        "--ways is 'x', which is not a whole number",
        "use a whole number",
    ),
    ("train --meta-lr x", 2, "--meta-lr is 'x', which is not a number", "use a number"),
    ("compare --ways", 2, "--ways has no value", "see mamlctl compare --help"),
    ("compare --ways=3 --ways", 2, "--ways has no value", "see mamlctl compare --help"),
    ("train --quiet=yes", 2, "--quiet does not take a value", "leave out"),
    ("train --quiet=yes --quiet", 2, "--quiet does not take a value", "leave out"),
    ("train --no-msl=1 --no-msl", 2, "--no-msl does not take a value", "leave out"),
    ("train glyphs", 2, "unexpected argument 'glyphs'", "leave it out, or see mamlctl train --help"),
    ("eval", 2, "the argument 'run' is missing", "see mamlctl eval --help"),
    ("train --dataset glyphs --wyas 3", 2, "unknown option '--wyas'", "did you mean '--ways'"),
    ("train --bogus", 2, "unknown option '--bogus'", "see mamlctl train --help"),
    ("train --xyzzy", 2, "unknown option '--xyzzy'", "see mamlctl train --help"),
    ("train --config nowhere.yaml", 2, "nowhere.yaml cannot be read", "YAML"),
    ("train --dataset glyphs --algo fomaml --no-first-order", 2, "--first-order is False", "another --algo"),
    ("train --dataset glyphs --meta-batch-size 100000000", 2, "must be below", "less than"),
    ("train --dataset glyphs --seed 18446744073709551616", 2, "must be below", "less than"),
    ("train --resume nowhere", 1, "no run folder nowhere", "mamlctl train"),
    ("eval nowhere", 1, "no run folder nowhere", "mamlctl train"),
    ("trian", 2, "unknown command 'trian'", "did you mean 'train'"),
    ("xyzzy", 2, "unknown command 'xyzzy'", "use one of train, eval"),
    ("fetch omniglott", 2, "unknown data set 'omniglott'", "did you mean 'omniglot'"),
    ("fetch omniglot --from nowhere", 3, "nowhere", ""),
    ("fetch", 2, "fetch needs the name of a data set", "mamlctl fetch --list"),
    ("fetch glyphs --list --force", 2, "--force has no effect with --list", "leave it out"),
    ("fetch --verify --mirror http://x", 2, "--mirror has no effect with --verify", "leave it out"),
    ("fetch omniglot --mirror folder", 2, "--mirror folder is not a web address", "--from"),
    ("fetch omniglot --offline --mirror http://x", 2, "no effect with --offline", "leave out"),
    ("fetch glyphs --force --mirror http://x", 2, "--mirror has no effect on glyphs", "leave it out"),
    ("fetch --verify omniglot", 3, "omniglot is not in", "mamlctl fetch omniglot"),
    ("fetch --list nothing", 2, "unknown data set 'nothing'", "use "),
    ("compare runs/a runs/b", 1, "no run folder runs/a", "mamlctl train"),
    ("compare", 2, "nothing to compare", "--algos maml,maml++"),
    ("compare runs/a --algos maml", 2, "--algos has no effect with run folders", "leave it out"),
    ("compare runs/a --filters 5", 2, "--filters has no effect with run folders", "leave it out"),
    ("compare --algos maml,mamll --dataset glyphs", 2, "unknown algorithm 'mamll'", "did you mean"),
    ("compare --algos maml,maml --dataset glyphs", 2, "--algos is 'maml,maml'", "each algorithm once"),
    ("compare --algos maml --algo maml", 2, "--algo has no effect with --algos", "leave it out"),
    (
        "ablate --dataset glyphs --plan one-one",
        2,
        "--plan is 'one-one', which is not a plan",
        "one-on, one-off",
    ),
    ("ablate --dataset glyphs --msl", 2, "--msl is varied by the plan", "leave it out"),
    ("ablate --dataset glyphs --order msl-da", 2, "--order has no effect", "cumulative"),
    ("ablate --dataset glyphs --plan cumulative --order msl-dada", 2, "names 'dada'", "did you mean 'da'"),
    ("ablate --dataset glyphs --plan full --grid msl=true", 2, "--plan and --grid", "one of them"),
    ("ablate --dataset glyphs --grid inner_lr", 2, "--grid inner_lr has no values", "inner_lr=0.1,0.4"),
    ("ablate --dataset glyphs --grid inner_rl=1", 2, "unknown setting 'inner_rl'", "did you mean 'inner_lr'"),
    ("ablate --dataset glyphs --grid ways=5,20", 2, "--grid cannot vary ways", "a table for each"),
    ("ablate --dataset glyphs --grid inner_steps=2,x", 2, "inner_steps is 'x'", "a whole number"),
    ("ablate --dataset glyphs --csv --json", 2, "--json and --csv are given together", "choose one"),
    ("ablate --dataset glyphs --sort bset", 2, "cannot sort by 'bset'", "did you mean 'best'"),
    (
        "ablate --dataset glyphs --executor slurm",
        2,
        "--executor is 'slurm', which is not an executor",
        "use local or ray",
    ),
    ("ablate --dataset glyphs --executor ray --slice x", 2, "--slice 'x' is not a duration", "write 90s"),
    ("ablate --dataset glyphs --address auto", 2, "--address has no effect", "--executor ray"),
    ("ablate --dataset glyphs --split tset", 2, "--split is 'tset'", "did you mean 'test'"),
    ("ablate --dataset glyphs --cg-steps 3", 2, "--cg-steps has no effect in any row", "leave it out"),
    ("ablate --resume nowhere", 1, "nowhere has no readable plan.yaml", "mamlctl ablate"),
    ("ablate --resume nowhere --ways 5", 2, "--ways has no effect with --resume", "leave it out"),
]


@pytest.mark.parametrize(("line", "code", "fact", "hint"), BAD, ids=[case[0] for case in BAD])
def test_bad_input_prints_a_fact_and_a_hint_and_sets_the_exit_code(
    cli, tmp_path, monkeypatch, line, code, fact, hint
):
    monkeypatch.chdir(tmp_path)
    exit_code, out, err = cli(*line.split())
    assert (exit_code, out) == (code, "")
    assert_two_lines(err, fact, hint)
    assert list(tmp_path.iterdir()) == [], "no file may be written"


def test_all_problems_with_settings_are_printed_at_once(cli):
    code, _, err = cli(
        "train", "--dataset", "glyphs", "--ways", "1", "--no-da", "--da-epochs", "3", "--bn", "x"
    )
    assert code == 2
    assert err.startswith("error: 3 settings are wrong\n")
    assert all(word in err for word in ("--ways is 1", "--da-epochs", "--bn is 'x'"))


def test_offline_without_the_data_exits_with_3_and_names_the_fetch_command(cli, tmp_path):
    code, _, err = cli("train", "--dataset", "omniglot", "--offline", data_root=tmp_path)
    assert code == 3
    assert_two_lines(err, "omniglot is not", "mamlctl fetch omniglot")
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    ("--ways 4", "--ways is 4, but the run to resume has 3", "start a new run"),
    ("--set device=cuda:9", "cuda:9", "--device cpu"),
    ("--set report_every=often", "report_every is 'often'", "use a whole number"),
    ("--checkpoint-every soon", "--checkpoint-every 'soon' is not a duration", "write 90s, 9m or 1h30m"),
    ("--print-config", "--print-config has no effect with --resume", "leave it out"),
]


@pytest.mark.parametrize(("words", "fact", "hint"), REFUSED, ids=[case[0] for case in REFUSED])
def test_an_existing_run_is_not_changed(cli, trained, words, fact, hint):
    code, _, err = cli("train", "--resume", trained, *words.split())
    assert code == 2
    assert_two_lines(err, fact, hint)


def test_an_existing_run_is_not_overwritten(cli, trained):
    code, _, err = cli("train", *QUICK_WORDS, "--out", trained)
    assert code == 1
    assert_two_lines(err, "already contains a run", "--resume")


def test_resuming_a_finished_run_only_prints_that_it_is_finished(cli, trained):
    before = (trained / "metrics.jsonl").read_text()
    code, _, err = cli("train", "--resume", trained, "--ways", "3")
    assert code == 0
    assert "already finished" in err
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained run whose files a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def test_a_comparison_is_not_written_into_a_run(cli, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for out in (copy, "~/copy"):
        code, _, err = cli("compare", copy, "--tasks", "4", "--out", out)
        assert code == 2
        assert_two_lines(err, f"--out {copy} already contains a table or a run", "choose another --out")


@pytest.mark.parametrize("command", [["ablate"], ["compare", "--algos", "maml,fomaml"]])
def test_settings_can_come_from_a_pipe(cli, command):
    reader, writer = os.pipe()
    os.write(writer, b"dataset: glyphs\nfilters: 9\n")
    os.close(writer)
    code, out, err = cli(*command, "--config", f"/dev/fd/{reader}", "--print-commands")
    os.close(reader)
    assert (code, err) == (0, "")
    assert "--filters 9" in out


def test_truncated_checkpoints_exit_with_1(cli, copy):
    for path in (copy / "checkpoints").iterdir():
        truncate(path)
    for words in (("eval", copy), ("train", "--resume", copy)):
        code, _, err = cli(*words)
        assert code == 1
        assert_two_lines(err, "last.pt cannot be read", "another checkpoint")


def test_resume_falls_back_to_the_previous_checkpoint(cli, copy, trained):
    truncate(copy / "checkpoints" / "last.pt")
    code, _, err = cli("train", "--resume", copy)
    assert code == 0
    assert "last.pt cannot be read" in err and "resuming from previous.pt, which is from meta-step 6" in err
    lasts = [(path / "checkpoints" / "last.pt").read_bytes() for path in (copy, trained)]
    assert lasts[0] == lasts[1]


def test_eval_uses_the_whole_checkpoints_and_says_which(cli, copy):
    def models():
        code, out, err = cli("eval", copy, "--tasks", "4", "--json")
        assert code == 0
        results = json.loads(out)
        return err, results["notes"], [(row["model"], row["epochs"]) for row in results["results"]]

    _, notes, before = models()
    assert notes == []
    best, second = before[1][1]
    folder = copy / "checkpoints"
    truncate(folder / "last.pt")
    err, notes, rows = models()
    assert rows == before
    assert "last.pt cannot be read" in err and f"using epoch-000{best}.pt, epoch-000{second}.pt" in notes[0]
    truncate(folder / f"epoch-000{best}.pt")
    err, notes, rows = models()
    assert rows == before
    assert "last.pt cannot be read" in err and notes[0].endswith(f": using best.pt, epoch-000{second}.pt")
    truncate(folder / f"epoch-000{second}.pt")
    err, notes, rows = models()
    assert rows == [("best", [best]), ("ensemble-1", [best])]
    assert "using best.pt" in err
    truncate(folder / "best.pt")
    err, notes, rows = models()
    assert rows == [("last", [])] and "; 1 other checkpoint cannot be used either: using previous.pt" in err
    truncate(folder / "previous.pt")
    code, _, err = cli("eval", copy, "--tasks", "4")
    assert code == 1
    assert_two_lines(err, "last.pt cannot be read", "use another checkpoint")
    assert "; 2 other checkpoints cannot be used either" in " ".join(err.split())


def test_eval_counts_only_checkpoints_that_exist(cli, copy):
    shutil.rmtree(copy / "checkpoints")
    code, _, err = cli("eval", copy, "--tasks", "4")
    assert code == 1
    assert_two_lines(err, "there is no checkpoint", "start a new run")
    assert "cannot be used either" not in err


def test_eval_uses_best_pt_for_a_damaged_file_of_the_best_epoch(cli, copy):
    def results():
        code, out, err = cli("eval", copy, "--tasks", "4", "--json")
        assert code == 0, err
        document = json.loads(out)
        return document["notes"], document["results"]

    _, before = results()
    best, second = before[1]["epochs"]
    folder = copy / "checkpoints"
    truncate(folder / f"epoch-000{best}.pt")
    (note,), after = results()
    assert after == before
    assert f"epoch-000{best}.pt cannot be read" in note
    assert note.endswith(f": using best.pt, epoch-000{second}.pt")
    truncate(folder / "best.pt")
    (note,), after = results()
    assert [(row["model"], row["epochs"]) for row in after] == [("best", [second]), ("ensemble-1", [second])]
    assert note.endswith(f"; 1 other checkpoint cannot be used either: using epoch-000{second}.pt")


def test_eval_uses_the_next_epoch_for_a_damaged_file_of_the_best_one_without_best_pt(cli, copy):
    _, out, _ = cli("eval", copy, "--tasks", "4", "--json")
    best, second = json.loads(out)["results"][1]["epochs"]
    truncate(copy / "checkpoints" / f"epoch-000{best}.pt")
    (copy / "checkpoints" / "best.pt").unlink()
    code, out, err = cli("eval", copy, "--tasks", "4", "--json")
    assert code == 0, err
    document = json.loads(out)
    rows = [(row["model"], row["epochs"]) for row in document["results"]]
    assert rows == [("best", [second]), ("ensemble-1", [second])]
    assert document["notes"][0].endswith(f": using epoch-000{second}.pt")


def test_a_copy_of_the_last_checkpoint_is_not_one_of_the_best_epochs(cli, copy):
    folder = copy / "checkpoints"
    shutil.copy(folder / "last.pt", folder / "epoch-0009.pt")
    truncate(folder / "last.pt")
    code, out, err = cli("eval", copy, "--tasks", "4", "--json")
    assert code == 0, err
    assert sorted(json.loads(out)["results"][1]["epochs"]) == [1, 2]


def test_eval_tests_the_named_checkpoint(cli, copy):
    for name, model, epochs in (
        ("epoch-0001.pt", "best", [1]),
        (copy / "checkpoints" / "last.pt", "last", []),
    ):
        code, out, _ = cli("eval", copy, "--tasks", "4", "--json", "--checkpoint", name)
        assert code == 0
        result = json.loads(out)
        assert (result["results"][0]["model"], result["results"][0]["epochs"]) == (model, epochs)
        assert result["notes"] == [f"with checkpoint {Path(name).name}"]
    code, _, err = cli("eval", copy, "--checkpoint", "epoch-0009.pt")
    assert code == 1
    assert_two_lines(err, "there is no checkpoint", "name another checkpoint")


def test_a_checkpoint_of_the_run_counts_more_than_a_file_with_its_name(cli, copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best.pt").write_bytes(b"no checkpoint")
    monkeypatch.setenv("HOME", str(copy))
    file = copy / "checkpoints" / "best.pt"
    folders = set()
    for name in ("best.pt", file, os.path.relpath(file), "~/checkpoints/best.pt"):
        code, out, err = cli("eval", copy, "--tasks", "4", "--json", "--checkpoint", name)
        assert code == 0, err
        folders.add(json.loads(out)["folder"])
    assert len(folders) == 1
    protocol = json.loads((Path(folders.pop()) / "summary.json").read_text())["protocol"]
    assert protocol["checkpoint"] == "best.pt"
    settings = EvalConfig(tasks=4, checkpoint=str(file))
    assert find_evaluation(open_run(copy), settings).protocol["checkpoint"] == "best.pt"
    code, _, err = cli("eval", copy, "--checkpoint", "./best.pt")
    assert code == 1
    assert_two_lines(err, "checkpoint best.pt cannot be read", "another checkpoint")


def test_divergence_exits_with_4_and_names_the_meta_step(cli, tmp_path):
    run = tmp_path / "run"
    code, _, err = cli("train", *QUICK_WORDS, "--algo", "maml", "--inner-lr", "1e30", "--out", run, "--quiet")
    assert code == 4
    assert_two_lines(err, "training diverged at meta-step 1: the", "lower --inner-lr")
    assert json.loads((run / "status.json").read_text())["status"] == "diverged"
    assert (run / "checkpoints" / "last.pt").is_file()


def start(run, root, *words, out=None, until="metrics.jsonl"):
    """Start a long run with its output in RUN.out (or `out`) and RUN.err, and wait for a file of the run."""
    long = [*QUICK_WORDS, "--steps-per-epoch", "100000", "--out", run, "--data-root", root, *words]
    with out or run.with_suffix(".out").open("wb") as out, run.with_suffix(".err").open("wb") as err:
        process = preloaded.Process(["-m", "mamlctl", "train", *long], out, err)
    deadline = time.monotonic() + 120
    while not (run / until).exists():
        assert process.poll() is None, run.with_suffix(".err").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_save_and_exit_with_their_code_and_the_run_can_be_resumed(
    cli, tmp_path, glyphs_root, number, code
):
    run = tmp_path / "run"
    process = start(run, glyphs_root)
    busy = cli("train", "--resume", run)
    assert busy[0] == 5
    assert_two_lines(busy[2], f"is in use by process {process.pid}", "wait for it")
    process.send_signal(number)
    process.wait()
    assert process.returncode == code
    assert "Traceback" not in run.with_suffix(".err").read_text()
    assert f"mamlctl train --resume {run}" in run.with_suffix(".out").read_text()
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", number.name)
    step = status["step"]
    limited = cli("train", "--resume", run, "--time-limit", "1s")
    assert limited[0] == 0
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "time limit")
    assert status["step"] >= step


@pytest.mark.process
def test_a_run_whose_terminal_closes_saves_and_exits_with_129(tmp_path, glyphs_root):
    run = tmp_path / "run"
    terminal, stdout = os.openpty()
    process = start(run, glyphs_root, out=os.fdopen(stdout, "wb"))
    os.close(terminal)  # from now on, writing to stdout fails
    process.send_signal(signal.SIGHUP)
    process.wait()
    assert process.returncode == 129
    assert "error" not in run.with_suffix(".err").read_text()
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "SIGHUP")


def test_an_ignored_sighup_stays_ignored(cli):
    """As under nohup, so that the run continues after its terminal is closed."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli("--version")[0] == 0
        with StopRequests(ignore, time_limit_s=None) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason() == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.process
def test_a_second_ctrl_c_exits_at_once(tmp_path, glyphs_root):
    run = tmp_path / "run"
    # The first meta-step takes at least half a minute, so the first request is still pending at the second.
    slow = ["--meta-batch-size", "2000", "--filters", "64"]
    process = start(run, glyphs_root, *slow, until="checkpoints/last.pt")
    before = (run / "checkpoints" / "last.pt").read_bytes()
    time.sleep(1)  # until the first meta-step has begun: a request before it is answered at once
    process.send_signal(signal.SIGINT)
    # Python merges two signals that arrive during the same torch operation.
    while "Ctrl-C exits at once" not in run.with_suffix(".err").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait()
    assert process.returncode == 130
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("interrupted", "exited without saving")
    assert (run / "checkpoints" / "last.pt").read_bytes() == before


def test_a_signal_during_a_write_to_stderr_is_a_request_to_stop():
    def write(event):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with StopRequests(write, time_limit_s=None) as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(RuntimeError):  # the next notice is not written from a signal handler
            stop.reason()
        assert stop.reason() == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_eval_changes_no_file_of_the_training(cli, trained):
    def contents():
        return {
            path: path.read_bytes()
            for path in trained.rglob("*")
            if path.is_file() and "eval" not in path.parts
        }

    before = contents()
    for bn in ("transductive", "running"):
        assert cli("eval", trained, "--tasks", "4", "--bn", bn)[0] == 0
    assert contents() == before


def test_a_checkpoint_of_another_run_is_refused(cli, trained, tmp_path):
    other = tmp_path / "other"
    assert cli("train", *QUICK_WORDS, "--seed", "9", "--out", other, "--quiet")[0] == 0
    shutil.copytree(trained / "checkpoints", other / "checkpoints", dirs_exist_ok=True)
    code, _, err = cli("eval", other)
    assert code == 1
    assert_two_lines(err, "was written by a run with other settings", "another checkpoint")


def test_training_does_not_resume_from_weights_alone(cli, copy):
    for name in ("last.pt", "previous.pt"):
        shutil.copy(copy / "checkpoints" / "best.pt", copy / "checkpoints" / name)
    code, _, err = cli("train", "--resume", copy)
    assert code == 1
    assert_two_lines(err, "last.pt contains weights only", "another checkpoint")
    code, _, err = cli("eval", copy, "--tasks", "4")
    assert code == 0
    assert "does not record which epochs were best: using epoch-000" in err


def test_changed_data_are_refused_by_resume_and_reported_by_eval(cli, trained, tmp_path, glyphs_root):
    changed = load_pack(next(glyphs_root.glob("glyphs/*.npy")), "glyphs")
    reversed_ = pack(changed.images_MCHW[::-1].copy(), changed.counts, changed.names)
    save_pack(tmp_path / "glyphs" / next(glyphs_root.glob("glyphs/*.npy")).name, reversed_)
    code, _, err = cli("train", "--resume", trained, data_root=tmp_path)
    assert code == 3
    assert_two_lines(err, "but the run started with", "--data-root")
    code, _, err = cli("eval", trained, "--tasks", "4", data_root=tmp_path)
    assert code == 0
    assert "not those of the training" in err


@pytest.mark.parametrize("status", [None, "{"])
def test_a_run_that_lost_its_last_checkpoints_is_not_started_again(cli, copy, status):
    if status:
        (copy / "status.json").write_text(status)
    for name in ("last.pt", "previous.pt"):
        (copy / "checkpoints" / name).unlink()
    before = (copy / "metrics.jsonl").read_text()
    code, _, err = cli("train", "--resume", copy)
    assert code == 1
    assert_two_lines(err, "has reports, but neither last.pt nor previous.pt", "restore one of them")
    assert (copy / "metrics.jsonl").read_text() == before


def test_a_model_without_what_only_training_needs_is_not_trained_again(cli, copy):
    for file in ("metrics.jsonl", "checkpoints/last.pt", "checkpoints/previous.pt"):
        (copy / file).unlink()
    before = (copy / "checkpoints" / "best.pt").read_bytes()
    code, _, err = cli("train", "--resume", copy)
    assert code == 1
    assert_two_lines(err, "has best.pt, but neither last.pt nor previous.pt", "restore one of them")
    assert (copy / "checkpoints" / "best.pt").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_from_the_beginning(cli, copy, trained):
    shutil.rmtree(copy / "checkpoints")
    (copy / "metrics.jsonl").unlink()
    code, _, err = cli("train", "--resume", copy, "--report-every", "1")
    assert code == 0
    assert "no checkpoint yet" in err
    lasts = [(path / "checkpoints" / "epoch-0002.pt").read_bytes() for path in (copy, trained)]
    assert lasts[0] == lasts[1], "the weights do not depend on how often a run reports"
    reported = [entry["step"] for entry in open_run(copy).metrics() if entry["kind"] == "report"]
    assert reported == [1, 2, 3, 4, 5, 6]


NOT_LOADED = "libtorch_cpu.so: failed to map segment from shared object"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        ImportError(NOT_LOADED),
        ImportError(f"numpy cannot be imported.\nOriginal error was: {NOT_LOADED}\n"),
    ],
)
def test_a_lack_of_memory_prints_a_fact_and_a_hint(cli, tmp_path, monkeypatch, error):
    def fail(*arguments, **named):
        raise error

    monkeypatch.setattr("mamlctl.experiments.train.open_streams", fail)
    code, _, err = cli("train", *QUICK_WORDS, "--out", tmp_path / "run")
    assert code == 1
    assert_two_lines(err, "does not have enough memory", "use a smaller --meta-batch-size")
    monkeypatch.setattr("mamlctl.experiments.fetch.fetch_all", fail)
    code, _, err = cli("fetch", "glyphs")
    assert code == 1
    assert_two_lines(err, "does not have enough memory", "end other programs, or use a machine with more")


@pytest.mark.parametrize("reason", ["Operation not permitted", "No such file"])
def test_a_library_that_cannot_be_loaded_for_another_reason_is_not_a_lack_of_memory(reason):
    assert not is_out_of_memory(ImportError(f"{NOT_LOADED}: {reason}"))


@pytest.mark.parametrize("out", ["/proc/nope", "/etc/passwd/x", "x" * 300])
def test_an_unwritable_folder_prints_a_fact_and_a_hint(cli, out):
    code, _, err = cli("train", *QUICK_WORDS, "--out", out)
    assert code == 1
    assert_two_lines(err, "error: ", "can be read and written")


@pytest.mark.process
@pytest.mark.parametrize("reader", ["left", "full disk"])
def test_training_continues_when_its_progress_cannot_be_written(tmp_path, glyphs_root, reader):
    words = [*program(), "train", *QUICK_WORDS, "--out", tmp_path / "run", "--data-root", glyphs_root]
    read_end, write_end = os.pipe()
    os.close(read_end)
    full = os.open("/dev/full", os.O_WRONLY) if Path("/dev/full").exists() else write_end
    stderr = write_end if reader == "left" else full
    done = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, stderr=stderr, text=True)
    for handle in {write_end, full}:
        os.close(handle)
    assert done.returncode == 0
    assert done.stdout.startswith("finished  ")


def test_a_closed_pipe_causes_no_traceback(trained):
    command = f"{sys.executable} -m mamlctl train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--workers="], ["--workers=2"], ["--workers", "2"], ["--json"]])
def test_a_stored_command_lacks_only_the_flags_of_the_call(monkeypatch, words):
    monkeypatch.setattr("sys.argv", ["mamlctl", "ablate", *words, "--dataset", "glyphs"])
    assert grid_command() == "mamlctl ablate --dataset glyphs"

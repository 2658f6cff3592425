"""The run folder: one writer, atomic files, and no overwritten files of the user."""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import threading
from typing import get_args

import pytest
from helpers.shared import ignore

from mamlctl.core.errors import STOP_EXIT_CODES, DivergedError, MamlctlError
from mamlctl.core.files import append_text, is_locked, one_writer, replacing, write_json, write_text
from mamlctl.core.literals import StopReason
from mamlctl.core.metrics_rows import rows_of
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.experiments.settings import resolve_settings
from mamlctl.experiments.train import train
from mamlctl.run_folder import (
    ENVIRONMENT,
    METRICS,
    STATUS,
    SUMMARY,
    RunState,
    new_run,
    open_run,
    run_state,
    upgrade,
)
from mamlctl.settings.schema import TrainConfig


def make_run(path):
    return new_run(path, TrainConfig(), TrainConfig(), command="mamlctl train", environment={"python": "3"})


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as file:
        file.write(b"one")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"two, cut o")
        raise KeyError
    assert path.read_bytes() == b"one"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_json_contains_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": 2}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}


def test_a_new_run_describes_itself(tmp_path):
    with make_run(tmp_path / "run") as run:
        names = {path.name for path in run.path.iterdir()}
    assert names == {"config.yaml", "command.txt", "environment.json", "lock"}
    assert open_run(run.path).config == TrainConfig()


def test_a_run_detects_whether_it_was_trained_on_other_data(tmp_path):
    with make_run(tmp_path / "run") as run:
        assert run.dataset_digest is None and run.trained_on("a")
        write_json(run.path / "environment.json", {"dataset_digest": "a"})
        assert [run.trained_on(digest) for digest in ("a", None, "b")] == [True, True, False]
        assert run.trained_on("b", ["a"])
        write_json(run.path / "environment.json", {"dataset_digest": "a", "dataset_older_digests": ["c"]})
        assert run.trained_on("c") and run.trained_on("b", ["c"]) and not run.trained_on("b", ["d"])
        for damaged in (None, 5, "b", [["b"]]):
            write_json(
                run.path / "environment.json", {"dataset_digest": "a", "dataset_older_digests": damaged}
            )
            assert run.trained_on("a") and not run.trained_on("b")


def test_existing_files_are_not_overwritten(tmp_path):
    with make_run(tmp_path / "run"):
        pass
    with pytest.raises(MamlctlError, match="already contains a run"), make_run(tmp_path / "run"):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(MamlctlError, match="is not empty"), make_run(tmp_path / "mine"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(MamlctlError, match="is a file"), make_run(tmp_path / "file"):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_a_brief_probe_of_the_lock_does_not_block_a_writer(tmp_path):
    with (tmp_path / "lock").open("wb") as probe:
        fcntl.flock(probe, fcntl.LOCK_EX)
        threading.Timer(0.05, fcntl.flock, (probe, fcntl.LOCK_UN)).start()
        with one_writer(tmp_path):
            assert is_locked(tmp_path)


def test_only_one_process_can_write_to_a_run(tmp_path):
    code = (
        "import sys; from pathlib import Path; from mamlctl.run_folder import open_run; "
        "from mamlctl.core.errors import MamlctlError\n"
        "try:\n"
        "    with open_run(Path(sys.argv[1])).writing(): print('writing')\n"
        "except MamlctlError as error: print(error.message)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    with make_run(tmp_path / "run"):
        output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert f"is in use by process {os.getpid()}" in output
        with pytest.raises(MamlctlError, match="is in use"), make_run(tmp_path / "run"):
            pass
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "writing\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported(monkeypatch, tmp_path, code):
    def no_flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_flock)
    (tmp_path / "lock").write_text("process 999999")  # left by an earlier run
    with pytest.raises(MamlctlError, match="cannot be locked"), one_writer(tmp_path):
        pass
    assert not is_locked(tmp_path)
    assert (tmp_path / "lock").read_text() in ("", "process 999999")


def test_a_path_that_is_not_utf8_keeps_its_bytes_in_files(tmp_path):
    write_text(tmp_path / "command.txt", os.fsdecode(b"--out caf\xe9"))
    append_text(tmp_path / "command.txt", os.fsdecode(b" \xe9"))
    assert (tmp_path / "command.txt").read_bytes() == b"--out caf\xe9 \xe9"


def test_an_error_of_a_full_disk_names_the_file(tmp_path):
    least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, most))
    try:
        for write in (write_text, append_text):
            with pytest.raises(OSError, match="File too large") as error:
                write(tmp_path / "x", 20_000 * "x")
            assert error.value.filename == str(tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    assert list(tmp_path.iterdir()) == [tmp_path / "x"], "the temporary file is removed"


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(MamlctlError, match="there is no run folder"):
        open_run(tmp_path / "absent")
    with pytest.raises(MamlctlError, match="is not a run folder"):
        open_run(tmp_path)
    (tmp_path / "config.yaml").write_text("ways: [")
    with pytest.raises(MamlctlError, match="is damaged"):
        open_run(tmp_path)
    for text, problem in (("", "contains no settings"), ("ways: 5\n", "settings are missing")):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(MamlctlError, match=problem):
            open_run(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"status": ["a"], "step": "7", "reason": null, "diverged_at": "q"}', "[1]", "{"]
)
def test_values_of_the_wrong_type_in_a_state_count_as_missing(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert run_state(tmp_path) == RunState(None)


def test_a_folder_left_by_a_killed_start_is_not_a_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text("process 1")
    (tmp_path / "run" / ".config.yaml.half").write_text("dataset: ")
    with make_run(tmp_path / "run") as run:
        assert (run.path / "config.yaml").is_file()


def test_other_files_next_to_half_written_settings_are_not_overlooked(tmp_path):
    (tmp_path / ".config.yaml.half").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(MamlctlError, match="is not empty"), make_run(tmp_path):
        pass


def test_foreign_lines_in_metrics_are_skipped(tmp_path):
    with make_run(tmp_path / "run") as run:
        pass
    whole = b'{"step": 1, "epoch": 0, "query_losses": [2.0], "tasks_per_second": 9.5}'
    (run.path / "metrics.jsonl").write_bytes(b"[1]\n" + whole + b"\n\xff\xfe\n")
    assert [entry["step"] for entry in run.metrics()] == [1]


REPORT = {"kind": "report", "step": 1, "epoch": 0, "tasks_per_second": 2.5}
VALIDATION = {"kind": "validation", "step": 1, "epoch": 1, "val_accuracy": None, "val_tasks": 4}


@pytest.mark.parametrize(
    "damage",
    [
        REPORT | {"tasks_per_second": None},
        REPORT | {"tasks_per_second": 0},
        REPORT | {"step": "1"},
        REPORT | {"kind": "letter"},
        {"step": 1, "epoch": 0},
        {key: value for key, value in VALIDATION.items() if key != "val_accuracy"},
        {key: value for key, value in VALIDATION.items() if key != "epoch"},
        VALIDATION | {"val_accuracy": "high"},
        VALIDATION | {"epoch": None},
        REPORT | {"kind": []},
        REPORT | {"step": float("inf")},
        REPORT | {"tasks_per_second": float("nan")},
        REPORT | {"rates": 5},
        REPORT | {"rates": {"w": "x"}},
        REPORT | {"rates": {"w": ["x"]}},
        REPORT | {"query_losses": 5},
        REPORT | {"meta_lr": "high"},
        VALIDATION | {"val_accuracy": 10**400},
        VALIDATION | {"step": float("inf")},
        VALIDATION | {"val_per_step": {"0": 1}},
    ],
)
def test_only_the_damaged_row_of_metrics_is_skipped(tmp_path, damage):
    with make_run(tmp_path / "run") as run:
        pass
    rows = [REPORT, damage, VALIDATION]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.metrics() == run.last_metrics() == [REPORT, VALIDATION]


def test_metrics_skip_an_incomplete_line_and_rewind_to_a_checkpoint(tmp_path):
    with make_run(tmp_path / "run") as run:
        pass
    for step in (5, 10):
        run.append_metrics("report", {"step": step, "epoch": 0, "tasks_per_second": 1.0})
    run.append_metrics("validation", {"step": 10, "epoch": 1, "val_accuracy": 0.5, "val_tasks": 4})
    run.append_metrics("report", {"step": 15, "epoch": 1, "tasks_per_second": 1.0})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo')
    assert [entry["step"] for entry in run.metrics()] == [5, 10, 10, 15]
    assert run.last_metrics() == run.metrics()
    assert [entry["epoch"] for entry in rows_of(run.metrics(), "validation")] == [1]
    run.rewind_metrics(10, 1)
    assert [entry["step"] for entry in run.metrics()] == [5, 10, 10]
    run.rewind_metrics(10, 0)
    assert [entry["step"] for entry in run.metrics()] == [5, 10]
    assert not any("val_accuracy" in entry for entry in run.metrics())


def test_rewinding_keeps_whole_lines_and_says_which_were_damaged(tmp_path):
    with make_run(tmp_path / "run") as run:
        pass
    rows = [json.dumps(REPORT | {"step": step}) + "\n" for step in (1, 2, 3, 4)]
    rows[1:2] = ["\0\0\0\n", '{"kind": "report"}\n']
    (run.path / "metrics.jsonl").write_text("".join(rows) + '{"kind": "rep')
    assert [row["step"] for row in run.metrics()] == [1, 3, 4]
    assert run.rewind_metrics(4, 0) == "metrics.jsonl: dropped 2 damaged lines (2, 3)"
    assert [row["step"] for row in run.metrics()] == [1, 3, 4]
    assert run.rewind_metrics(4, 0) == ""


def test_opening_a_run_for_writing_removes_the_temporary_files_of_a_killed_process(tmp_path):
    with make_run(tmp_path / "run") as run:
        pass
    run.checkpoints.mkdir()
    others = [run.path / ".config.yaml.swp", run.path / ".gitignore", run.checkpoints / "epoch-0001.pt"]
    remnants = [run.path / ".status.json.x_12abcd", run.checkpoints / ".last.pt.x_12abcd"]
    remnants += [run.path / ".status.json.x_12abcd.new", run.checkpoints / ".last.pt.x_12abcd.new"]
    for path in [*others, *remnants]:
        path.touch()
    with run.writing():
        assert not any(path.exists() for path in remnants)
    assert all(path.exists() for path in others)


def test_writing_a_file_removes_what_killed_processes_have_left_for_it(tmp_path):
    gone, others = tmp_path / ".a.json.killed_1", [tmp_path / ".b.json.killed_2", tmp_path / ".a.json.backup"]
    for path in [gone, *others]:
        path.touch()
    with replacing(tmp_path / "a.json") as file:
        file.write(b"first")
        write_text(tmp_path / "a.json", "second")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a.json", *others])
    assert (tmp_path / "a.json").read_bytes() == b"first", "a file that is being written is kept"


def test_a_written_file_is_not_taken_for_a_remnant_before_it_is_moved(tmp_path, monkeypatch):
    path, chmod = tmp_path / "a.json", type(tmp_path).chmod

    def written_meanwhile(temporary, mode):
        monkeypatch.undo()
        write_text(path, "second")
        chmod(temporary, mode)

    monkeypatch.setattr(type(tmp_path), "chmod", written_meanwhile)
    write_text(path, "first")
    assert path.read_text() == "first"
    assert [*tmp_path.iterdir()] == [path]


def test_last_metrics_reads_only_the_end_of_a_long_file(tmp_path):
    with make_run(tmp_path / "run") as run:
        pass
    assert run.last_metrics() == []
    for step in range(1, 1001):
        run.append_metrics("report", {"step": step, "epoch": 0, "tasks_per_second": 1.0})
    last = run.last_metrics()
    assert last == run.metrics()[-len(last) :] and 100 < len(last) < 1000


def test_a_state_is_read_as_written_and_is_empty_without_a_file(tmp_path):
    with make_run(tmp_path / "run") as run:
        assert run.state() == RunState(None)
        for state in (RunState("running", 3), RunState("diverged", 7, "the query loss is nan", 8)):
            run.set_state(state)
            assert run.state() == run_state(run.path) == state
    for damaged in ('{"status": "fini', "[" * 200_000):
        (run.path / "status.json").write_text(damaged)
        assert run.state() == RunState(None)


@pytest.mark.parametrize(
    ("file", "old", "added"),
    [
        (STATUS, {"status": "finished", "step": 12, "reason": ""}, {}),
        (STATUS, {"status": "diverged", "step": 5, "reason": "at meta-step 6: nan"}, {"diverged_at": 6}),
        (
            STATUS,
            {"status": "diverged", "step": 5, "reason": "training diverged at meta-step 6: the loss is nan"},
            {"diverged_at": 6, "reason": "the loss is nan"},
        ),
        (STATUS, {"status": "diverged", "step": 5, "reason": "predictions are nan"}, {"diverged_at": 5}),
        (STATUS, {"status": "diverged", "step": 5, "reason": "at meta-step 6", "diverged_at": 7}, {}),
        (ENVIRONMENT, {"device": "cpu (x86_64, 1 threads)"}, {"device": "cpu (x86_64, 1 thread)"}),
        (ENVIRONMENT, {"device": "cpu (x86_64, 11 threads)"}, {}),
        (ENVIRONMENT, {}, {}),
        (METRICS, {"step": 1, "query_losses": [1.0]}, {"kind": "report"}),
        (METRICS, {"step": 1, "val_tasks": 8}, {"kind": "validation"}),
        (METRICS, {"step": 1}, {"kind": ""}),
        (METRICS, {"step": 1, "val_tasks": 8, "kind": "report"}, {}),
        (
            SUMMARY,
            {"results": [{"model": "last"}, {"model": "ensemble-5"}, {"model": "x", "kind": "ensemble"}]},
            {
                "results": [
                    {"model": "last", "kind": "best"},
                    {"model": "ensemble-5", "kind": "ensemble"},
                    {"model": "x", "kind": "ensemble"},
                ]
            },
        ),
    ],
)
def test_files_of_older_versions_are_upgraded(file, old, added):
    assert upgrade(file, old) == old | added


def trained(path, **settings):
    """Train briefly on curves, in the folder `path`."""
    short = {"dataset": "sinusoid", "epochs": 1, "steps_per_epoch": 3, "val_tasks": 2, "report_every": 2}
    config = resolve_settings([("flag", short | settings)]).config
    return train(config, out=path, offline=True, time_limit_s=None, command="", on_event=ignore)


def test_every_row_of_metrics_has_its_kind(tmp_path):
    trained(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["report", "report", "report", "validation"]
    assert {key for row in map(json.loads, lines[:3]) for key in row if key.startswith("val_")} == set()


def test_a_failed_run_records_its_error(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(MetaStep, "_of_own_tasks", fail)
    with pytest.raises(MamlctlError, match="cpu does not have enough memory for 1 task per pass"):
        trained(tmp_path / "run")
    state = run_state(tmp_path / "run")
    assert (state.status, state.reason) == ("failed", "cpu does not have enough memory for 1 task per pass")


def test_a_diverged_run_records_its_meta_step(tmp_path):
    with pytest.raises(DivergedError) as raised:
        trained(tmp_path / "run", inner_lr=1e30)
    state = run_state(tmp_path / "run")
    assert (state.status, state.step, state.diverged_at) == ("diverged", 0, 1)
    assert raised.value.step == 1 and state.reason == raised.value.cause
    assert state.reason and "meta-step" not in state.reason
    assert raised.value.message == f"training diverged at meta-step 1: {state.reason}"


def test_every_reason_to_stop_has_an_exit_code():
    assert STOP_EXIT_CODES.keys() == set(get_args(StopReason))
    assert [STOP_EXIT_CODES[reason] for reason in ("", "time limit", "SIGINT", "SIGTERM", "SIGHUP")] == [
        0,
        0,
        130,
        143,
        129,
    ]

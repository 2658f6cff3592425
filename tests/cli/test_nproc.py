"""Commands with several processes: --nproc and torchrun, signals, deaths and hangs of single processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.rank_cases import free_port
from helpers.trainer_cases import comparable

from mamlctl.core.errors import ExitCode
from mamlctl.core.process import LAUNCHED
from mamlctl.run_folder import open_run

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in Linux's /proc"),
]

RUN = ["train", "--dataset", "sinusoid", "--engine", "adjoint", "--device", "cpu", "--val-tasks", "20"]
RUN += ["--epochs", "2", "--steps-per-epoch", "150", "--report-every", "10", "--checkpoint-every", "1s"]
LEAVE_S = 10  # within which all processes end after one has died
SLOW = 10  # a busy machine is that much slower; tests check durations only against it


class Command:
    """A command with several processes, in a new session; its output goes to files."""

    def __init__(self, folder, *words, torchrun=()):
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        mamlctl = ["-m", "mamlctl", *map(str, words)]
        start = ["-m", "torch.distributed.run", *torchrun, *mamlctl] if torchrun else mamlctl
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *start], stdout=out, stderr=err, env=environment, cwd=folder
            )

    def rank(self, number):
        """The process id of a rank."""
        mine = {str(self.process.pid)}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                facts = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if parent in mine and b"RANK=%d" % number in facts:
                return int(entry.name)
        raise AssertionError(f"there is no rank {number}")

    def wait_for(self, text, file=None):
        """Wait until the display has printed a text."""
        deadline = time.monotonic() + 60 * SLOW
        while text not in (file or self.err).read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.err.read_text()
            time.sleep(0.02)

    def end(self):
        """The exit code, what the command printed, and the seconds until it ended."""
        start = time.monotonic()
        code = self.process.wait(60 * SLOW)
        return code, self.out.read_text(), self.err.read_text(), time.monotonic() - start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def whole(folder):
    """A run of two processes that nothing has disturbed."""
    code, out, err, _ = Command(folder, *RUN, "--out", "whole", "--nproc", 2).end()
    assert code == 0, err
    assert "finished  whole" in out
    return open_run(folder / "whole")


def test_a_run_of_two_processes_is_that_of_one_up_to_rounding(cli, whole, tmp_path):
    assert cli(*RUN, "--out", tmp_path / "one")[0] == 0
    one, two = (
        torch.load(path / "checkpoints" / "best.pt", weights_only=True)["content"]["stored"]
        for path in (tmp_path / "one", whole.path)
    )
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], rtol=1e-3, atol=1e-4) for name in one)
    assert "2 x cpu" in (whole.path.parent / "err.txt").read_text()


def test_a_signal_and_a_death_lose_nothing(folder, whole):
    command = Command(folder, *RUN, "--out", "disturbed", "--nproc", 2)
    command.wait_for("step 20/")
    os.kill(command.rank(1), signal.SIGTERM)
    code, out, err, _ = command.end()
    assert code == ExitCode.TERMINATED
    assert "interrupted (SIGTERM)  disturbed" in out
    assert "SIGTERM on another rank: saved" in err
    state = json.loads((folder / "disturbed" / "status.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "SIGTERM")

    command = Command(folder, "train", "--resume", "disturbed", "--nproc", 2)
    command.wait_for("epoch 1/2  val")
    command.wait_for("step 170/")
    os.kill(command.rank(1), signal.SIGKILL)
    code, out, err, seconds = command.end()
    assert code == ExitCode.RANK_LOST
    assert "error: rank 1 of 2 was killed by SIGKILL; it has written nothing\nhint:" in err
    assert "Traceback" not in err
    assert seconds < LEAVE_S

    command = Command(folder, "train", "--resume", "disturbed", "--nproc", 2)
    assert command.end()[0] == 0
    assert comparable(open_run(folder / "disturbed")) == comparable(whole)


def test_the_death_of_rank_0_ends_the_others(folder):
    command = Command(folder, *RUN, "--out", "headless", "--nproc", 3)
    command.wait_for("step 10/")
    others = [command.rank(number) for number in (1, 2)]
    os.kill(command.rank(0), signal.SIGKILL)
    code, _, err, seconds = command.end()
    assert code == ExitCode.RANK_LOST
    assert "error: rank 0 of 3 was killed by SIGKILL; its last lines are above" in err
    assert seconds < LEAVE_S
    assert not any(Path(f"/proc/{pid}").exists() for pid in others)


def test_a_rank_that_hangs_is_named_after_the_timeout(folder):
    command = Command(folder, *RUN, "--out", "hung", "--nproc", 2, "--rank-timeout", "4s")
    command.wait_for("step 10/")
    os.kill(command.rank(1), signal.SIGSTOP)
    code, _, err, seconds = command.end()
    assert code == ExitCode.RANK_LOST
    assert "error: rank 1 of 2 has not answered for 4s" in err
    assert 4 < seconds + 1 < 4 + 2 * LEAVE_S
    assert json.loads((folder / "hung" / "status.json").read_text())["status"] == "failed"


HANGING_NET = """
import os, time
from pathlib import Path
from torch import nn


class Net(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.body, self.head = nn.Linear(width, 8), nn.Linear(8, outputs)

    def forward(self, x):
        if os.environ["RANK"] == "1" and Path("hang").exists():
            time.sleep(1000)
        return self.head(self.body(x).relu())


def make(shape, outputs):
    return Net(*shape, outputs)
"""


def test_the_error_says_where_a_rank_hangs(folder):
    (folder / "net.py").write_text(HANGING_NET)
    words = [*RUN, "--net", "net.py:make", "--steps-per-epoch", "9999", "--out", "where"]
    command = Command(folder, *words, "--nproc", 2, "--rank-timeout", "3s")
    command.wait_for("step 10/")
    (folder / "hang").touch()
    code, _, err, seconds = command.end()
    assert code == ExitCode.RANK_LOST
    assert "error: rank 1 of 2 ended with exit code 1; its last lines:\n  error: rank 1 (process " in err
    assert "net.py" in err
    assert "      time.sleep(1000)\nhint:" in err
    assert seconds < 3 + 2 * LEAVE_S


def test_torchrun_restarts_a_run_from_its_last_checkpoint(folder, whole):
    options = ["--nproc-per-node", "2", "--max-restarts", "1", "--master-port", str(free_port())]
    command = Command(folder, *RUN, "--out", "restarted", torchrun=options)
    command.wait_for("step 20/")
    os.kill(command.rank(1), signal.SIGKILL)
    code, out, err, _ = command.end()
    assert code == 0, err
    assert "finished  restarted" in out
    assert comparable(open_run(folder / "restarted")) == comparable(whole)


def test_two_launchers_share_a_run_and_end_together(folder):
    """The second machine is another launcher with an address of its own on the loopback network."""
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "two"]
    rendezvous += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    places = [folder / "first", folder / "second"]
    launchers = []
    for number, place in enumerate(places, 1):
        place.mkdir()
        options = [*rendezvous, "--local-addr", f"127.0.0.{number}"]
        words = [*RUN, "--steps-per-epoch", "9999", "--out", folder / "machines"]
        launchers.append(Command(place, *words, torchrun=options))
    deadline = time.monotonic() + 60 * SLOW
    while not any("step 10/" in launcher.err.read_text() for launcher in launchers):
        assert all(launcher.process.poll() is None for launcher in launchers)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    writer = next(n for n, launcher in enumerate(launchers) if "step 10/" in launcher.err.read_text())
    other = launchers[1 - writer]
    rank = other.rank(1)
    other.process.kill()  # as a machine that loses its power, together with its rank
    os.kill(rank, signal.SIGKILL)
    other.process.wait()
    code, _, err, seconds = launchers[writer].end()
    assert code != 0
    assert "rank 1 (process " in err
    assert seconds < 2 * LEAVE_S  # that of torchrun included
    assert json.loads((folder / "machines" / "status.json").read_text())["status"] == "failed"


def test_ctrl_z_stops_all_processes_until_they_continue(folder):
    command = Command(folder, *RUN, "--out", "paused", "--nproc", 2)
    command.wait_for("step 10/")
    ids = [command.process.pid, command.rank(0), command.rank(1)]

    def states():
        return {Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in ids}

    command.process.send_signal(signal.SIGTSTP)
    deadline = time.monotonic() + 5 * SLOW
    while states() != {"T"} and time.monotonic() < deadline:
        time.sleep(0.02)
    assert states() == {"T"}
    command.process.send_signal(signal.SIGCONT)
    code, _, err, _ = command.end()
    assert code == 0, err


@pytest.mark.parametrize("launcher", ["--nproc", "torchrun"])
def test_the_launcher_takes_its_processes_with_it(folder, launcher):
    words = [*RUN, "--steps-per-epoch", "9999", "--out", launcher.strip("-")]
    if launcher == "torchrun":
        options = ["--nproc-per-node", "2", "--master-port", str(free_port())]
        command = Command(folder, *words, torchrun=options)
    else:
        command = Command(folder, *words, "--nproc", 2)
    command.wait_for("step 10/")
    ranks = [command.rank(number) for number in (0, 1)]
    command.process.kill()
    command.process.wait()
    deadline = time.monotonic() + LEAVE_S * SLOW
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    state = json.loads((folder / launcher.strip("-") / "status.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "SIGTERM")


def test_a_test_by_two_processes_has_the_scores_of_one(cli, folder, whole, tmp_path):
    words = ["eval", whole.path, "--tasks", 50, "--models", "best"]
    assert cli(*words)[0] == 0
    (summary,) = whole.path.glob("eval/*/summary.json")
    scores = (summary.with_name("tasks.csv")).read_text()
    summary.with_name("tasks.csv").unlink()
    code, _, err, _ = Command(folder, *words, "--nproc", 2, "--json").end()
    assert code == 0, err
    assert len(json.loads((folder / "out.txt").read_text())["results"]) == 1
    one, two = (
        [float(line.split(",")[-1]) for line in text.splitlines()[1:]]
        for text in (scores, summary.with_name("tasks.csv").read_text())
    )
    assert two == pytest.approx(one, rel=1e-4)


def test_rank_0_draws_alone_after_a_test_by_two_processes(folder, whole):
    """It pre-trains a run for its figure first, with an algorithm whose tasks cannot be shared."""
    shutil.copytree(whole.path, folder / "drawn")
    code, out, err, _ = Command(folder, "eval", "drawn", "--tasks", 20, "--plot", "--nproc", 2).end()
    assert code == 0, err
    assert "picture  drawn/plots/regression.png" in out


def test_a_comparison_by_two_processes_tests_all_runs(folder, whole):
    code, out, err, _ = Command(folder, "compare", "whole", "--tasks", 30, "--nproc", 2, "--json").end()
    assert code == 0, err
    assert "testing whole" in err
    assert json.loads(out)


USAGE = [
    (["train", "--nproc", "0"], "--nproc is 0, which is not a number of processes"),
    (["train", "--rank-timeout", "9m"], "--rank-timeout has no effect on one process"),
    (["train", "--nproc", "2", "--rank-timeout", "soon"], "--rank-timeout 'soon' is not a duration"),
    (["train", "--list", "nets", "--nproc", "2"], "--nproc has no effect with --list"),
    (
        ["compare", "--algos", "maml", "--nproc", "2"],
        "--nproc has no effect without run folders\nhint:  use --workers",
    ),
    (["ablate", "--nproc", "2"], "unknown option '--nproc'\nhint:  use --workers"),
    (["train", "--print-config", "--nproc", "0"], "--nproc is 0, which is not a number of processes"),
    (["train", "--print-config", "--rank-timeout", "9m"], "--rank-timeout has no effect on one process"),
    (
        ["train", "--print-config", "--nproc", "2", "--algo", "transfer"],
        "2 processes cannot share the tasks of --algo transfer",
    ),
    (
        ["eval", "run", "--support", ".", "--query", ".", "--nproc", "2"],
        "--nproc has no effect with --support",
    ),
]


@pytest.mark.parametrize(("words", "fact"), USAGE)
def test_wrong_options_are_refused(cli, words, fact):
    code, _, err = cli(*words)
    assert code == ExitCode.USAGE
    assert err.startswith(f"error: {fact}")
    assert "\nhint:  " in err


def test_several_processes_print_their_settings_once(cli, monkeypatch):
    for rank, lines in (("0", True), ("1", False)):
        as_started_by_torchrun(monkeypatch, rank)
        code, out, _ = cli("train", "--print-config")
        assert (code, bool(out)) == (ExitCode.OK, lines)


def test_an_error_before_training_is_printed_once(folder):
    words = ["train", "--algo", "transfer", "--dataset", "line", "--out", "refused", "--nproc", 2]
    code, _, err, _ = Command(folder, *words).end()
    assert code == ExitCode.USAGE
    assert err.count("error: ") == 1
    assert "2 processes cannot share the tasks of --algo transfer: a meta-batch is one batch" in err
    assert not (folder / "refused").exists()


def as_started_by_torchrun(monkeypatch, rank="0"):
    facts = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)


SINGLE = [
    (["fetch", "glyphs"], "mamlctl fetch"),
    (["ablate"], "mamlctl ablate"),
    (["compare", "--algos", "maml"], "mamlctl compare without run folders"),
    (["eval", "run", "--support", ".", "--query", "."], "mamlctl eval --support"),
]


@pytest.mark.parametrize(("words", "what"), SINGLE)
def test_commands_that_cannot_share_their_work_refuse_torchrun(cli, monkeypatch, words, what):
    as_started_by_torchrun(monkeypatch)
    code, _, err = cli(*words)
    assert code == ExitCode.USAGE
    assert err.startswith(f"error: {what} is one process, but torchrun has started 2\nhint:")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_imports_ends_all_processes_silently(folder, number):
    command = Command(folder, *RUN, "--out", "early", "--nproc", 2)
    deadline = time.monotonic() + 5 * SLOW
    while time.monotonic() < deadline:
        with suppress(AssertionError):
            command.rank(1)
            break
    command.process.send_signal(number)
    code, _, err, _ = command.end()
    assert (code, err) == (128 + number, "")


def test_a_process_ends_at_once_if_its_launcher_has_ended(folder, monkeypatch):
    as_started_by_torchrun(monkeypatch, "1")
    monkeypatch.setenv(LAUNCHED, str(os.getppid()))  # not this process, which is the parent
    code, _, err, _ = Command(folder, *RUN).end()
    assert (code, err) == (ExitCode.TERMINATED, "")


def test_a_port_in_use_is_named(folder, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        facts = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        facts["MASTER_PORT"] = str(taken.getsockname()[1])
        for name, value in facts.items():
            monkeypatch.setenv(name, value)
        code, _, err, _ = Command(folder, *RUN, "--out", "port", "--rank-timeout", "5s").end()
    assert code == ExitCode.FAILED
    assert "address already in use\nhint:  choose another port, e.g. with torchrun --master-port" in err


def test_torchrun_with_restarts_needs_a_folder(cli, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    code, _, err = cli("train", "--dataset", "line")
    assert code == ExitCode.USAGE
    assert "torchrun may restart this command 3 times, but each start would begin a new run" in err

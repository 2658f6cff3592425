"""Tests on a real Ray cluster: results equal those without it to the bit, even if a node dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers import preloaded
from helpers.trainer_cases import comparable, config_of, make_run, trainer_of

import mamlctl
from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import one_writer
from mamlctl.engine.training import checkpoints
from mamlctl.experiments.executors import ray_cluster, ray_worker
from mamlctl.experiments.executors.jobs import KILLED, ChildProcess, Job
from mamlctl.experiments.executors.ray_cluster import open_cluster, room
from mamlctl.experiments.executors.ray_worker import Files, WorkerSlot, pack, stamps, unpack
from mamlctl.run_folder import RunFolder, open_run, run_state

TINY = """
--dataset glyphs --ways 3 --filters 4 --inner-steps 2 --meta-batch-size 2 --steps-per-epoch 20 --val-tasks 6
"""
# Health checks of nodes that do not answer; with ray's defaults they would outlast the test.
SOON = {"health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
ABSENT = "ray is not installed: pip install -e '.[cluster]'"
TIMES = {"tasks_per_second", "memory_bytes", "seconds", "time", "pid"}  # which differ between equal runs
PATIENCE_S = 600  # against endless waits; the whole file takes a minute on an idle machine


os.environ["OMP_NUM_THREADS"] = "1"  # as in a cell with one CPU: rounding depends on the number of threads
os.environ.update(ray_cluster.ENVIRONMENT)  # ray reads it on its import, which is here before open_cluster


def job_of(folder, data_root, *, epochs=7):
    root = ("--data-root", str(data_root))
    train = (*TINY.split(), *root, "--quiet", "--epochs", str(epochs), "--seed", str(len(folder.name)))
    return Job(folder.name, folder, train, ("--tasks", "20", "--quiet", *root))


def undisturbed(jobs, parent):
    """Run the same commands in new folders without Ray, in parallel; return the folders."""
    folders = [parent / job.name for job in jobs]
    for command in (Job.train_command, Job.eval_command):
        words = [words for job, folder in zip(jobs, folders, strict=True) if (words := command(job, folder))]
        children = [subprocess.Popen([preloaded.python(), "-m", "mamlctl", *each]) for each in words]
        assert [child.wait() for child in children] == [0] * len(children)
    return folders


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def results(folder):
    """All numbers in a run folder: metrics, checkpoints and evaluations."""
    run = open_run(folder)
    files = sorted(path.relative_to(folder) for path in folder.glob("checkpoints/*.pt"))
    digests = {str(name): checkpoints._digest(torch.load(folder / name)) for name in files}
    tests = {
        str(path.relative_to(folder)): summary_without_times(path)
        if path.suffix == ".json"
        else path.read_text()
        for path in sorted(folder.glob("eval/*/*"))
    }
    return [without_times(entry) for entry in run.metrics()], digests, tests


def summary_without_times(path):
    """A summary without its times, and without its digest, which covers them."""
    return {
        name: value for name, value in without_times(json.loads(path.read_text())).items() if name != "digest"
    }


def kill_node(node):
    """Kill all processes of a node at once, with workers and their children, as if its machine failed."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    doomed = [process.process.pid for each in node.all_processes.values() for process in each]
    for pid in doomed:
        doomed += [child for child, parent in parents.items() if parent == pid and child not in doomed]
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def until(executor, condition):
    """Poll the executor until the condition is true; return the jobs that have ended in the meantime."""
    ended, deadline = [], time.monotonic() + PATIENCE_S
    while not condition(ended):
        assert time.monotonic() < deadline, "the cluster takes too long"
        ended += executor.ended()
        time.sleep(0.05)
    return ended


@pytest.fixture(scope="module")
def nodes():
    """A cluster of two nodes on this machine, with one CPU each; the second node may be killed."""
    pytest.importorskip("ray", reason=ABSENT)
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "_system_config": SOON},
    )
    try:
        yield cluster, cluster.add_node(num_cpus=1, num_gpus=0)
    finally:
        cluster.shutdown()


@pytest.fixture
def events():
    return []


@pytest.mark.cluster
def test_results_are_those_without_ray_even_if_a_node_is_killed(nodes, events, glyphs_root, tmp_path, capfd):
    cluster, second = nodes
    jobs = [job_of(tmp_path / name, glyphs_root) for name in ("a", "bb")]
    jobs[0] = replace(jobs[0], evaluate=())
    with open_cluster(
        cluster.address, slots=None, cpus=1, gpus=0, slice_s=0.5, on_event=events.append
    ) as executor:
        assert executor.slots == 2
        for job in jobs:
            executor.start(job)
        of_node = {executor._ray.get(running.node): running.job for running in executor._running}
        victim = of_node[second.node_id]
        ended = until(executor, lambda _: run_state(victim.folder).step > 0)
        assert run_state(victim.folder).status == "interrupted"  # a slice is back, and the next one runs
        for running in executor._running:
            running.limit_s = 600  # so that only one slice is lost
        kill_node(second)
        ended += until(executor, lambda more: len(ended) + len(more) == 2)
        assert executor.slots == 1
    assert {(each.name, each.code) for each in ended} == {("a", 0), ("bb", 0)}
    lost = [event.text for event in events if "lost its slot" in event.text]
    assert len(lost) == 1
    assert lost[0].startswith(f"{victim.name} lost its slot on node ")
    assert second.node_id[:8] in lost[0]
    assert any(second.node_id[:8] in event.text and "died: 1 node" in event.text for event in events)
    assert capfd.readouterr().out == ""
    for job, alone in zip(jobs, undisturbed(jobs, tmp_path / "alone"), strict=True):
        assert results(job.folder) == results(alone)
        assert len(results(job.folder)[2]) == (2 if job.evaluate else 0)
        commands = (job.folder / "command.txt").read_text().splitlines()
        assert all(str(job.folder) in line for line in commands)


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stop_saves_and_returns_the_run_folders(nodes, events, glyphs_root, tmp_path, monkeypatch, number):
    monkeypatch.setattr(ray_cluster, "HEARD_S", 3.0)
    names = (f"going-{uuid4().hex}", "waiting")
    going, queued = (job_of(tmp_path / name, glyphs_root, epochs=5000) for name in names)
    with open_cluster(
        nodes[0].address, slots=2, cpus=1, gpus=0, slice_s=600, on_event=events.append
    ) as executor:
        executor.start(going)
        until(executor, lambda _: [*Path(tempfile.gettempdir()).glob(f"*/{going.name}/checkpoints/last.pt")])
        executor.start(queued)
        with pytest.raises(MamlctlError, match="in use"), one_writer(going.folder):
            pass
        executor.stop(number)
        ended = {each.name: each for each in executor.ended()}
    assert {name: each.code for name, each in ended.items()} == dict.fromkeys(names, 128 + number)
    state = open_run(going.folder).state()
    assert (state.status, state.reason) == ("interrupted", number.name)
    saved = checkpoints.load(going.folder / "checkpoints/last.pt", owner=open_run(going.folder).owner)
    assert saved["position"]["step"] == state.step > 0
    with one_writer(going.folder):
        assert not (queued.folder / "config.yaml").exists()


@pytest.mark.cluster
def test_a_command_that_fails_is_not_repeated(nodes, events, glyphs_root, tmp_path):
    wrong = Job(
        "wrong", tmp_path / "wrong", (*TINY.split(), "--ways", "4000", "--data-root", str(glyphs_root)), ()
    )
    with open_cluster(
        nodes[0].address, slots=None, cpus=1, gpus=0, slice_s=60, on_event=events.append
    ) as executor:
        executor.start(wrong)
        ended = until(executor, lambda ended: ended)
    assert [(each.name, each.code) for each in ended] == [("wrong", 2)]
    assert "4000" in ended[0].error
    assert not [event for event in events if "lost" in event.text]


@pytest.mark.cluster
def test_a_slice_that_kills_every_slot_is_given_up(nodes, events, glyphs_root, tmp_path):
    job = job_of(tmp_path / "run", glyphs_root)
    with open_cluster(
        nodes[0].address, slots=None, cpus=1, gpus=0, slice_s=600, on_event=events.append
    ) as executor:
        executor.start(job)
        (running,) = executor._running
        slots, ended = 0, []
        while not ended:
            slot, slots = running.slot, slots + 1
            executor._ray.kill(slot)
            ended = until(executor, lambda ended, slot=slot: ended or running.slot is not slot)
    assert (slots, ended[0].code) == (ray_cluster.TRIES, 1)
    assert "actor" in ended[0].error
    assert len([event for event in events if "lost its slot" in event.text]) == slots - 1


@pytest.mark.cluster
def test_a_job_that_fits_on_no_node_is_refused(nodes, events):
    with (
        pytest.raises(MamlctlError, match="has 1 CPUs and 8 GPUs") as error,
        open_cluster(nodes[0].address, slots=None, cpus=1, gpus=8, slice_s=1, on_event=events.append),
    ):
        pass
    assert "lower --cell-cpus or --cell-gpus" in error.value.hint


@pytest.mark.cluster
def test_an_unreachable_cluster_is_reported_at_once(events, monkeypatch):
    pytest.importorskip("ray", reason=ABSENT)
    monkeypatch.setattr(ray_cluster, "REACH_S", 3.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert_unreachable(f"127.0.0.1:{port}", "refused", events)
        listener.listen()
        assert_unreachable(f"127.0.0.1:{port}", "no answer in 3 s", events)
    assert_unreachable("ray://127.0.0.1:1", "HOST:PORT", events)
    assert events == []


def assert_unreachable(address, why, events):
    with (
        pytest.raises(MamlctlError, match=f"no ray cluster can be used at {address}: .*{why}") as error,
        open_cluster(address, slots=None, cpus=1, gpus=0, slice_s=1, on_event=events.append),
    ):
        pass
    assert "ray start --head" in error.value.hint


def test_the_error_without_ray_names_the_extra(monkeypatch, events):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(MamlctlError, match="ray is not installed") as error,
        open_cluster("auto", slots=None, cpus=1, gpus=0, slice_s=1, on_event=events.append),
    ):
        pass
    assert error.value.hint == "pip install 'mamlctl[cluster]'"


def test_a_node_with_another_version_is_reported(tmp_path, glyphs_root):
    slot = WorkerSlot(job_of(tmp_path / "run", glyphs_root), 1, "0.0.1")
    result = slot.work(pack(tmp_path), "1s")
    slot.leave()
    assert (result.files, result.code) == (None, 1)
    assert f"has mamlctl {mamlctl.__version__}, but the command is 0.0.1: install one release" in result.error


def test_a_new_slot_removes_only_slots_of_killed_workers(tmp_path, glyphs_root):
    job = job_of(tmp_path / "run", glyphs_root)
    held, killed = (WorkerSlot(job, 1, mamlctl.__version__) for _ in range(2))
    killed._lock.release()  # as the operating system does
    new = WorkerSlot(job, 1, mamlctl.__version__)
    assert [slot._slot.exists() for slot in (held, killed, new)] == [True, False, True]
    for slot in (held, new):
        slot.leave()
        assert not slot._slot.exists()


class WindowsProcess(subprocess.Popen):
    """A process to which Ctrl-C cannot be sent."""

    def send_signal(self, number):
        if number == signal.SIGINT:
            raise ValueError(f"Unsupported signal: {number}")
        super().send_signal(number)


def test_a_slot_on_windows_ends_a_command_that_ctrl_c_does_not_reach(tmp_path, glyphs_root, monkeypatch):
    monkeypatch.setattr("mamlctl.experiments.executors.jobs.HANG_UP", ())
    monkeypatch.setattr(ray_worker, "SAVE_S", 0.0)
    slot = WorkerSlot(job_of(tmp_path / "run", glyphs_root), 1, mamlctl.__version__)
    with WindowsProcess([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        slot._child = object.__new__(ChildProcess)
        slot._child.process = process
        slot.stop(signal.SIGINT)
        assert process.wait(30) == KILLED
    slot.leave()


def test_room_counts_the_jobs_that_fit_on_each_node():
    nodes = [{"Resources": has} for has in ({"CPU": 8, "GPU": 2}, {"CPU": 3, "GPU": 4}, {"CPU": 64})]
    assert room(nodes, 2, 0) == 4 + 1 + 32
    assert room(nodes, 2, 1) == 2 + 1 + 0
    assert room(nodes, 0.5, 0.25) == 8 + 6 + 0


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/elsewhere", "a/../../elsewhere"])
def test_files_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "run"
    with pytest.raises(MamlctlError, match="elsewhere"):
        unpack(Files(("config.yaml", name), {"config.yaml": b"", name: b""}), folder)
    assert [*tmp_path.iterdir()] == []


def test_only_changes_are_sent_and_removed_files_disappear(tmp_path):
    source, target = tmp_path / "here", tmp_path / "there"
    unpack(
        Files(("config.yaml", "checkpoints/a.pt"), {"config.yaml": b"1", "checkpoints/a.pt": b"2"}), source
    )
    (source / "lock").write_text("process 1")
    (source / "checkpoints" / ".a.pt.x1").write_text("cut off")
    unpack(pack(source), target)
    sent = stamps(source)
    (source / "metrics.jsonl").write_text("{}\n")
    unpack(Files(("checkpoints/a.pt",), {"checkpoints/a.pt": b"3"}), source / "checkpoints" / "..")
    (source / "config.yaml").write_text("1")
    changes = pack(source, sent)
    assert changes.names == ("config.yaml", "checkpoints/a.pt")
    unpack(changes, target)
    assert {path.name: path.read_bytes() for path in target.rglob("*") if path.is_file()} == {
        "config.yaml": b"1",
        "a.pt": b"3",
    }


@pytest.mark.parametrize("first_stop", [None, 3], ids=["into-nothing", "over-an-earlier-slice"])
def test_a_partly_received_folder_resumes_to_the_same_result(tmp_path, first_stop):
    """If the driver is killed, any number of a slice's files may have been written."""
    config = config_of(inner_steps=1, val_tasks=4)
    whole = make_run(tmp_path / "whole", config)
    trainer_of(whole, whole.config).train()
    target = make_run(tmp_path / "there", config)
    early = Files((), {})
    if first_stop is not None:
        trainer_of(target, target.config, stop_at=first_stop).train()
        early = pack(target.path)
    again = trainer_of(target, target.config, stop_at=6)
    if again.last.exists():
        again.resume()
    assert again.train() == "asked"
    late = pack(target.path)
    for written in range(1, len(late.names) + 1):
        run = RunFolder(tmp_path / str(written), target.config)
        unpack(early, run.path)
        arrived = late.names[:written]
        kept = tuple(name for name in early.names if name not in arrived)
        unpack(Files((*arrived, *kept), late.changed), run.path)
        resumed = trainer_of(run, run.config)
        if resumed.last.exists():
            resumed.resume()
        else:
            run.rewind_metrics(0, 0)  # as experiments.train does
        resumed.train()
        assert comparable(run) == comparable(whole)

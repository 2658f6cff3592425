"""Jobs on a Ray cluster: each in slices, on any node, so that a node's death costs one slice at most."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mamlctl
from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import one_writer
from mamlctl.experiments.executors.jobs import Ended, Job
from mamlctl.experiments.executors.ray_worker import SliceResult, WorkerSlot, pack, unpack
from mamlctl.run_folder import run_state

TRIES = 4  # of one slice: so many places do not die by chance within one

CONNECT_S = 10.0

REACH_S = 60.0  # for ray's health check, which imports ray: 1 s on an idle machine. ray.init tries for 122 s

STOP_S = 60.0  # for all to save and come back: more than slices.SAVE_S

HEARD_S = 10.0  # for a place to hear of a stop; one that does not has no node yet

POLL_S = 0.1

LOOK_S = 2.0  # between two looks at which nodes there are

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # neither its question nor its reports
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # no GPU asked, none seen; said, so that ray does not warn
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # all: else ray prints a dead node's log on stdout, over any result
}


@dataclass
class UnderWay:
    """A job, the place that it has, and the slice that is awaited from there."""

    job: Job
    locked: ExitStack  # holds the run folder's lock
    limit_s: float
    tries: int = 0  # of this slice
    place: Any = None  # ray's handle of a slices.Place
    slice: Any = None  # ray's reference to a slices.Slice
    node: Any = None  # ray's reference to the id of the place's node
    testing: bool = False


class RayExecutor:
    """Runs jobs on the cluster that `open_cluster` reached. Follows jobs.Executor."""

    def __init__(
        self, ray: Any, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
    ) -> None:
        """`slots`: None: what the nodes have room for, looked up again whenever a node dies."""
        self._ray, self._on_event, self._slice_s = ray, on_event, slice_s
        self._cpus, self._gpus, self._fixed = cpus, gpus, slots
        # One thread works, another takes the stop meanwhile, a third tells where it is.
        self._actor = ray.remote(WorkerSlot).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=3
        )
        self._under_way: list[UnderWay] = []
        self._ended: list[Ended] = []
        self._stopped = 0
        self._alive: dict[str, str] = {}
        self._looked = -LOOK_S
        self.slots = slots or 1
        self._look()

    def start(self, job: Job) -> None:
        """Begin a job, as soon as a node has room for it."""
        job.folder.mkdir(parents=True, exist_ok=True)
        locked = ExitStack()
        try:
            locked.enter_context(one_writer(job.folder))
        except MamlctlError as error:
            self._ended.append(
                Ended(job.name, error.exit_code, f"error: {error.message}\nhint:  {error.hint}")
            )
            return
        work = UnderWay(job, locked, self._slice_s)
        self._under_way.append(work)
        self._go_on(work)

    def ended(self) -> Sequence[Ended]:
        """The jobs that ended since the last call; takes in what slices have finished, waits for none."""
        self._take_in()
        if time.monotonic() > self._looked + LOOK_S:
            self._look()
        ended, self._ended = self._ended, []
        return ended

    def stop(self, number: int) -> None:
        """Have every job save and end as that signal asks, and its folder brought back; a minute at most."""
        self._stopped = number
        began = time.monotonic()
        heard = {work.job.name: work.place.stop.remote(number) for work in self._under_way}
        while self._under_way and time.monotonic() < began + STOP_S:
            self._take_in()
            if time.monotonic() > began + HEARD_S:
                for work in [*self._under_way]:
                    if not self._ready([heard[work.job.name]]):
                        self._end(work, 128 + number, "stopped before a node had room for it")
            time.sleep(POLL_S)
        for work in [*self._under_way]:
            self._end(work, 128 + number, "stopped, but its node did not answer: its last slice is lost")

    def close(self) -> None:
        """Give every place back, at once."""
        for work in [*self._under_way]:
            self._end(work, -signal.SIGKILL, "left at once")

    def _look(self) -> None:
        """Which nodes there are now: tell those that came and went since the last look, and set `slots`."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        alive = {node["NodeID"]: _node_words(node) for node in nodes}
        self.slots = self._fixed or max(room(nodes, self._cpus, self._gpus), 1)
        now = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}, {self.slots} jobs at a time"
        if not self._alive:
            self._on_event(Notice(f"ray cluster: {now}"))
        for name in self._alive.keys() ^ alive.keys():
            if self._alive:
                change = "joined" if name in alive else "died"
                self._on_event(Notice(f"node {(self._alive | alive)[name]} {change}: {now}"))
        self._alive, self._looked = alive, time.monotonic()

    def _take_in(self) -> None:
        waiting = {work.slice: work for work in self._under_way}
        for reference in self._ready([*waiting]):
            self._take(waiting[reference])

    def _ready(self, references: list[Any]) -> list[Any]:
        if not references:
            return []
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _take(self, work: UnderWay) -> None:
        """A slice that came back, or did not."""
        errors = self._ray.exceptions
        try:
            came: SliceResult = self._ray.get(work.slice)
        except errors.RayTaskError as error:  # the node cannot do it, or we made a mistake
            self._end(work, ExitCode.FAILED, str(error))
        except errors.RayError as error:  # the place is gone
            self._lost(work, error)
        else:
            step = run_state(work.job.folder).step
            if came.files is not None:
                unpack(came.files, work.job.folder)
            if came.code != ExitCode.OK or work.testing:
                # A child that has not come as far as to hear a signal dies of it.
                killed = self._stopped and came.code == -self._stopped
                self._end(work, 128 + self._stopped if killed else came.code, came.said)
                return
            # Too short for its start and a meta-step, or in validation.
            if run_state(work.job.folder).step == step:
                work.limit_s *= 2
            work.tries = 0
            self._go_on(work, came.said)

    def _lost(self, work: UnderWay, error: Exception) -> None:
        work.tries += 1
        self._release(work)
        if self._stopped or work.tries >= TRIES:
            self._end(work, 128 + self._stopped if self._stopped else ExitCode.FAILED, str(error))
            return
        step, place = run_state(work.job.folder).step, self._place_words(work)
        self._on_event(Notice(f"{work.job.name} lost {place}: it goes on elsewhere from meta-step {step}"))
        self._go_on(work)

    def _place_words(self, work: UnderWay) -> str:
        if self._ready([work.node]):
            with suppress(self._ray.exceptions.RayError):
                name = self._ray.get(work.node)
                return f"its place on node {self._alive.get(name, name[:8])}"
        return "its place"

    def _go_on(self, work: UnderWay, said: str = "") -> None:
        """Ask for the next slice, in the place that the job has or in a new one; or end the job."""
        job, limit = work.job, f"{work.limit_s:.3f}s"
        training = job.train_command(job.folder, limit)
        if self._stopped or not (training or job.eval_command(job.folder)):
            self._end(work, 128 + self._stopped if self._stopped else ExitCode.OK, said)
            return
        work.testing = training is None
        files = None
        if work.place is None:
            files = pack(job.folder)
            work.place = self._actor.remote(job, self._cpus, mamlctl.__version__)
            work.node = work.place.node.remote()
        work.slice = work.place.work.remote(files, limit)

    def _end(self, work: UnderWay, code: int, said: str) -> None:
        self._release(work)
        work.locked.close()
        self._under_way.remove(work)
        self._ended.append(Ended(work.job.name, code, said))

    def _release(self, work: UnderWay) -> None:
        """Give a place back: its folder removed if it still answers, its resources free at once."""
        place, work.place = work.place, None
        if place is not None:
            self._ray.wait([place.leave.remote()], timeout=1.0)
            self._ray.kill(place)


def _node_words(node: Mapping[str, Any]) -> str:
    """Several nodes may be on one host, so with the beginning of ray's own name."""
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def room(nodes: Sequence[Any], cpus: float, gpus: float) -> int:
    """How many jobs of so many CPUs and GPUs ray's nodes have room for, each of them on one node."""
    asked = {name: number for name, number in (("CPU", cpus), ("GPU", gpus)) if number > 0}
    rooms = ([int(node["Resources"].get(name, 0) / need) for name, need in asked.items()] for node in nodes)
    return sum(min(each, default=1) for each in rooms)


@contextmanager
def open_cluster(
    address: str, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
) -> Iterator[RayExecutor]:
    """A cluster's executor for the block.

    `address`: HOST:PORT, "auto" (the cluster that this machine is part of) or "local" (started here, ended
    with the block). `slots`: jobs at a time; None: as many as there is room for. `cpus`, `gpus`: of each job.
    `slice_s`: seconds of training after which a run folder comes back. Raises MamlctlError if ray is not
    installed, no cluster answers, or no node has room for one job.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if not room(nodes, cpus, gpus):
            fact = f"no node of the cluster ({len(nodes)}) has {cpus:g} CPUs and {gpus:g} GPUs"
            raise MamlctlError(fact, hint="ask for less for each job, or add a node that has them")
        executor = RayExecutor(ray, slots=slots, cpus=cpus, gpus=gpus, slice_s=slice_s, on_event=on_event)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.update(ENVIRONMENT)
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MamlctlError("ray is not installed", hint="pip install 'mamlctl[cluster]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    if address != "local":
        _reach(address)
    handler = signal.getsignal(signal.SIGTERM)  # ray puts its own in its place
    own = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise _unreachable(address, str(error).strip().partition("\n")[0]) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Ask ray's own health check, in a process that can be left. Raises MamlctlError if there is no answer.

    ray.init tries for two minutes where nobody answers, and then ends its whole process.
    """
    where = [] if address == "auto" else ["--address", address]
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", *where]
    host, _, port = address.rpartition(":")
    if where and (not port.isdecimal() or "/" in host):
        raise _unreachable(address, "an address is HOST:PORT, as 'ray start --head' told it")
    try:
        if where:  # where nobody listens, the health check would still try for 40 s
            socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error
    try:
        done = subprocess.run(command, capture_output=True, timeout=REACH_S)
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"no answer in {REACH_S:g} s") from error
    if done.returncode and b"InvalidAuthToken" in done.stderr:
        hint = "set RAY_AUTH_MODE=token here and on every node, with the head's token (ray get-auth-token)"
        raise MamlctlError(f"the ray cluster at {address} asks for a token", hint=hint)
    if done.returncode:
        raise _unreachable(address, "its health check failed")


def _unreachable(address: str, why: str) -> MamlctlError:
    hint = "begin one with 'ray start --head'; mamlctl must run on one of its machines"
    return MamlctlError(f"no ray cluster can be used at {address}: {why}", hint=hint)

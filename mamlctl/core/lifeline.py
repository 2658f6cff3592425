"""Connections among the processes of a run: they show at once who died, who hangs, and how rank 0 ended.

Collective operations only fail with "connection closed" or a timeout, and those of NCCL wait for a dead
process forever. So each process ("rank") has a connection to rank 0, which a thread watches: the kernel
closes it when a process dies, however it dies.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

POLL_S = 0.2  # between looks at the clock
ANSWER_S = 2.0  # within which the thread of a healthy process answers, whatever its main thread does
CAUSE_S = 3.0  # after a failed collective operation until its cause is known
LEAVE_S = 5.0  # for the main thread to end the process after another one has died
CONNECT_S = 30.0  # for a connection within a cluster

Message = dict[str, Any]


@dataclass(frozen=True)
class Lost:
    """A process that died, ended with an error, or does not answer."""

    rank: int  # -1 if all processes answer, so that the connection between two of them must be broken
    why: str  # e.g. "died"
    where: str = ""  # its process id and machine

    @property
    def text(self) -> str:
        """What happened, for people."""
        if self.rank < 0:
            return self.why
        return f"rank {self.rank}{self.where and f' ({self.where})'} {self.why}"


class Lifeline:
    """The connection of this process to rank 0, or on rank 0 those to all others; watched by a thread."""

    def __init__(self, rank: int, count: int, *, timeout_s: float, on_stuck: Callable[[Lost], None]) -> None:
        """Make no connection yet.

        Args:
            rank: the number of this process, from 0.
            count: the number of processes.
            timeout_s: how long a collective operation may wait for the others.
            on_stuck: called in the thread if another process is lost and the main thread does not end this
                one within LEAVE_S; it has to end it.
        """
        self.rank, self.count, self.timeout_s = rank, count, timeout_s
        self.lost: Lost | None = None
        self.ended: int | None = None  # the exit code of rank 0, once it has ended
        self._on_stuck = on_stuck
        self._token = ""
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._buffers: dict[socket.socket, bytes] = {}
        self._rank_of: dict[socket.socket, int] = {}
        self._where: dict[int, str] = {}
        self._known = threading.Event()
        self._lost_at = 0.0
        self._left: set[int] = set()  # ranks that ended on purpose
        self._leaving = False
        self._calls, self._since = 0, float("inf")  # collective operations so far; start of the current one
        self._asked_at = float("inf")  # since when this process waits for the answers, or for rank 0
        self._answers: dict[int, int] = {}

    def listen(self, token: str) -> int:
        """Accept the other ranks on rank 0; returns the port. `token` is a secret that they all know."""
        self._token = token
        self._listener = socket.create_server(("", 0), backlog=self.count)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._start()
        port: int = self._listener.getsockname()[1]
        return port

    def connect(self, hosts: Sequence[str], port: int, token: str) -> None:
        """Connect to rank 0.

        Args:
            hosts: names and addresses of its machine, of which one can be reached.
            port: the port that `listen` returned.
            token: the secret.

        Raises:
            OSError: no connection is possible.
        """
        failure = OSError("rank 0 has no address")
        for host in hosts:
            try:
                with ExitStack() as stack:
                    connection = socket.create_connection((host, port), timeout=CONNECT_S / len(hosts))
                    stack.enter_context(connection)
                    connection.sendall(_line({"token": token, "rank": self.rank, "where": here()}))
                    if connection.recv(1) != b"\n":  # which a program that has only the address does not know
                        raise OSError(f"another program answers at {host}:{port}")
                    stack.pop_all()
            except OSError as error:
                failure = error
                continue
            self._add(connection, 0)
            self._start()
            return
        raise failure

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Watch a collective operation in the block."""
        self._calls += 1
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = float("inf")

    def cause(self) -> Lost | None:
        """Why a collective operation has failed; None if rank 0 has ended, or nothing is known."""
        deadline = time.monotonic() + CAUSE_S
        while self.ended is None and not self._known.wait(POLL_S) and time.monotonic() < deadline:
            pass
        return self.lost if self.ended is None else None

    def leave(self, code: int, failure: str = "") -> None:
        """Report to the others that this process ends.

        Args:
            code: its exit code.
            failure: why it fails on its own, which ends the others.
        """
        self._leaving = True
        for connection in list(self._rank_of):
            _send(connection, {"end": code, "failure": failure})

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(ANSWER_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a machine that loses its power
        self._rank_of[connection] = rank
        self._buffers[connection] = b""
        self._selector.register(connection, selectors.EVENT_READ)

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select(POLL_S):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            if now - self._since > self.timeout_s and self._asked_at == float("inf"):
                self._ask(now)
            if now - self._asked_at > (ANSWER_S if self.rank == 0 else 2 * ANSWER_S):
                self._judge()
            # A process that hangs is named to itself too.
            grace_s = 0.0 if self.lost is not None and self.lost.rank == self.rank else LEAVE_S
            if self.lost is not None and not self._leaving and now - self._lost_at > grace_s:
                self._on_stuck(self.lost)

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError, ValueError, KeyError, TypeError):
            connection, _ = self._listener.accept()
            connection.settimeout(ANSWER_S)
            hello = json.loads(connection.recv(4096))
            rank = int(hello["rank"])
            # Processes of another run that has the same port must not take the place of a rank.
            if hello["token"] == self._token and rank not in self._rank_of.values():
                connection.sendall(b"\n")
                self._where[rank] = str(hello["where"])
                self._add(connection, rank)
                _send(connection, {"where": here()})
            else:
                connection.close()

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self._closed(connection)
            return
        *lines, self._buffers[connection] = (self._buffers[connection] + data).split(b"\n")
        for line in lines:
            self._message(connection, json.loads(line))

    def _closed(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        rank = self._rank_of.pop(connection)
        connection.close()
        if rank not in self._left and self.ended is None:
            self._lose(Lost(rank, "died", self._where.get(rank, "")))

    def _message(self, connection: socket.socket, message: Message) -> None:
        rank = self._rank_of[connection]
        match message:
            case {"where": where}:
                self._where[rank] = where
            case {"end": code, "failure": failure}:
                self._left.add(rank)
                if failure:
                    self._lose(Lost(rank, f"ended: {failure}", self._where.get(rank, "")))
                elif rank == 0:
                    self.ended = code
            case {"lost": lost}:
                self._lose(Lost(**lost))
            case {"waited": True}:
                self._ask(time.monotonic())
            case {"ask": True}:
                _send(connection, {"calls": self._calls})
            case {"calls": calls}:
                self._answers[rank] = calls

    def _ask(self, now: float) -> None:
        """Ask all ranks how far they are, because one has waited too long; only rank 0 can ask."""
        if self._asked_at != float("inf"):
            return
        self._asked_at = now
        for connection in list(self._rank_of):
            _send(connection, {"ask": True} if self.rank == 0 else {"waited": True})

    def _judge(self) -> None:
        """Decide who hangs: the rank that has begun the fewest operations, or does not even answer."""
        self._asked_at = float("inf")
        if self.lost is not None:
            return
        waited = f"has not answered for {self.timeout_s:g} s"
        if self.rank:
            self._lose(Lost(0, waited, self._where.get(0, "")))
            return
        answers: Mapping[int, int] = {**dict.fromkeys(range(self.count), -1), **self._answers, 0: self._calls}
        slowest = min(answers, key=lambda rank: answers[rank])
        if answers[slowest] == max(answers.values()):
            self._lose(
                Lost(-1, f"a connection between two ranks is broken: no data for {self.timeout_s:g} s")
            )
        else:
            self._lose(Lost(slowest, waited, self._where.get(slowest, here() if slowest == 0 else "")))

    def _lose(self, lost: Lost) -> None:
        if self.lost is not None or self._leaving:
            return
        self.lost, self._lost_at = lost, time.monotonic()
        self._known.set()
        if self.rank == 0:
            for connection in list(self._rank_of):
                _send(connection, {"lost": asdict(lost)})


def here() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(connection: socket.socket, message: Message) -> None:
    with suppress(OSError):  # `_read` finds out
        connection.sendall(_line(message))

"""Start the processes of a run on this machine (`--nproc`), and report the one that ended the others.

The processes get the environment that `torchrun` gives, so both ways of starting them are the same to a run.
Nothing here imports torch.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import FrameType

from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.process import HANG_UP, LAUNCHED, module_command
from mamlctl.experiments.executors.local import threads_each

POLL_S = 0.05
LEAVE_S = 7.0  # for the other processes after one has ended; they do so by themselves within 5 s
SOON_S = 1.0  # the same if rank 0 has printed an error, after which nothing is left to do
TAIL_LINES = 20  # of the output of each process that an error shows
STACK = getattr(signal, "SIGUSR1", None)  # makes a process write its Python stack to stderr


@dataclass
class _Rank:
    """A process, with the end of what it has written to stderr."""

    number: int
    process: subprocess.Popen[bytes]
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    reader: threading.Thread | None = None  # of its stderr; rank 0 writes to that of this process

    def read(self) -> None:
        """Keep the last lines of the process until it closes its stderr."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.tail.append(line.decode(errors="replace").rstrip())

    @property
    def ending(self) -> str:
        """How the process ended."""
        code = self.process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


def launch(count: int, arguments: Sequence[str], timeout: str) -> int:
    """Run `mamlctl` with the same arguments in several processes, until all have ended.

    Args:
        count: the number of processes.
        arguments: the command line after `mamlctl`.
        timeout: --rank-timeout, for messages.

    Returns:
        The exit code.

    Raises:
        MamlctlError: a process died, or does not answer.
    """
    environment = _environment(count)
    command = [*module_command("mamlctl"), *arguments]
    ranks: list[_Rank] = []
    asked: list[int] = []
    with ExitStack() as stack:
        for number in (*HANG_UP, signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                before = signal.signal(number, _forward_to(ranks, asked))
                stack.callback(signal.signal, number, before)
        if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) != signal.SIG_IGN:
            stack.callback(signal.signal, signal.SIGTSTP, signal.signal(signal.SIGTSTP, _pause(ranks)))
        for number in range(count):
            ranks.append(_start(number, command, environment))
        return _wait(ranks, timeout, asked)


def accept_requests() -> None:
    """Let this process write its Python stack to stderr when `launch` asks where it hangs."""
    if STACK is not None:
        faulthandler.register(STACK)


def _environment(count: int) -> dict[str, str]:
    """What torchrun sets, for all ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        LAUNCHED: str(os.getpid()),
    }
    # By default gloo uses the address of the host's name, which may be that of a network that is down.
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    defaults = {"OMP_NUM_THREADS": str(threads_each(count))}
    if loopback:
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    return {**defaults, **os.environ, **common}


def _start(number: int, command: Sequence[str], environment: Mapping[str, str]) -> _Rank:
    own = {**environment, "RANK": str(number), "LOCAL_RANK": str(number)}
    # In groups of their own, so that Ctrl-C reaches only this process, which passes it on once.
    group = 0 if os.name == "posix" else None
    if number == 0:
        return _Rank(number, subprocess.Popen(command, env=own, process_group=group))
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(
        command, env=own, stdin=nothing, stdout=nothing, stderr=pipe, process_group=group
    )
    rank = _Rank(number, process)
    rank.reader = threading.Thread(target=rank.read, daemon=True)
    rank.reader.start()
    return rank


def _forward_to(ranks: Sequence[_Rank], asked: list[int]) -> Callable[[int, FrameType | None], None]:
    """Pass a signal on to the ranks, and note it in `asked`."""

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.process.send_signal(number)

    return forward


def _pause(ranks: Sequence[_Rank]) -> Callable[[int, FrameType | None], None]:
    """Let Ctrl-Z stop the ranks with this process, and let them continue with it."""

    def pause(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when this process continues
        for rank in ranks:
            rank.process.send_signal(signal.SIGCONT)

    return pause


def _wait(ranks: Sequence[_Rank], timeout: str, asked: Sequence[int]) -> int:
    """Wait for all processes; end them if one has ended and they do not follow.

    Args:
        ranks: the processes.
        timeout: --rank-timeout, for messages.
        asked: the signals that were passed on.

    Returns:
        The exit code.

    Raises:
        MamlctlError: as `launch` does.
    """
    ended: list[_Rank] = []  # in order
    hung: list[_Rank] = []
    deadline = float("inf")
    while len(ended) < len(ranks):
        for rank in ranks:
            if rank not in ended and rank.process.poll() is not None:
                ended.append(rank)
                if rank.number and rank.process.returncode == 0:
                    continue  # rank 0 has no more work for it, but may still draw or print
                own_error = rank.number == 0 and rank.process.returncode not in (0, ExitCode.RANK_LOST)
                grace = SOON_S if own_error and rank.process.returncode > 0 else LEAVE_S
                deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline and not hung:
            hung = [rank for rank in ranks if rank not in ended]
            _end(hung, where=all(rank.process.returncode == ExitCode.RANK_LOST for rank in ended))
        time.sleep(POLL_S)
    for rank in ranks:
        if rank.reader is not None:
            rank.reader.join(SOON_S)
    codes = {rank.process.returncode for rank in ranks if rank not in hung}
    code: int = ranks[0].process.returncode
    if codes == {code} and code >= 0 and code != ExitCode.RANK_LOST:
        return code
    # A signal kills a process that has not yet imported what saves a run.
    if asked and (own := codes - {ExitCode.RANK_LOST}) and own <= {-asked[0], 128 + asked[0]}:
        return 128 + asked[0]
    # Those that end because of another one have the exit code RANK_LOST, those that end in order have 0.
    guilty = [rank for rank in ended if rank.process.returncode != ExitCode.RANK_LOST and rank not in hung]
    guilty.sort(key=lambda rank: rank.process.returncode == 0)
    if ranks[0] in guilty and code > 0:
        return code  # it has printed its error
    if guilty:
        raise _error(guilty[0], guilty[0].ending, len(ranks))
    if hung:
        raise _error(hung[0], f"has not answered for {timeout}", len(ranks))
    raise _error(ended[0], "lost its connection to another rank", len(ranks))


def _end(ranks: Sequence[_Rank], *, where: bool) -> None:
    """End processes that hang; with `where`, after they have written where."""
    if where and STACK is not None:
        for rank in ranks:
            rank.process.send_signal(STACK)
        time.sleep(SOON_S)
    for rank in ranks:
        rank.process.kill()


def _error(rank: _Rank, what: str, count: int) -> MamlctlError:
    lines = "".join(f"\n  {line}" for line in rank.tail)
    last = f"; its last lines:{lines}" if lines else "; it has written nothing"
    if rank.number == 0:
        last = "; its last lines are above"
    error = MamlctlError(
        f"rank {rank.number} of {count} {what}{last}",
        hint="start the command again; a training run continues with --resume",
    )
    error.exit_code = ExitCode.RANK_LOST
    return error

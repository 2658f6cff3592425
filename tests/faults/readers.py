"""Malformed files, read by a process whose memory is limited: an error for the user, or the right content."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import resource
import signal
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType

import numpy as np

from faults.commands import Running, Undisturbed
from mamlctl.core.errors import MamlctlError

FILES = 200  # of one seed
MEMORY = 768 * 2**20  # bytes that a reader may allocate beyond what the process has at its start
SLOW_S = 20  # for one file
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
PROGRAM = "from faults.readers import main; main()"
SECRET = "secret-of-the-environment"

YAML_PIECES = (
    "ways: 5\n",
    "algo: maml\n",
    "- ",
    "? ",
    ": ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&a ",
    "*a ",
    "<<: ",
    "|\n ",
    "!!bool x",
    "!!int 1_0",
    "!!python/object/apply:os.getpid []",
    "!!binary =",
    "!!set {a}",
    "!x ",
    "%YAML 9",
    "${oc.env:SECRET}",
    "${ways}",
    "${",
    "???",
    "1e999",
    "0x",
    ".nan",
    "1" * 5000,
    "\t",
    "\0",
    "'",
    '"',
    "\n",
    "---\n",
    "...\n",
    "# ",
    "@",
    "`",
    "\u2028",
    "\ud7ff",
    "null",
    "~",
    "2026-11-26",
    "0o9",
    "1:2:3",
)
PICKLE_PIECES = (
    b"\x80\x04",
    b"(",
    b"}",
    b"]",
    b")",
    b"N.",
    b"R",
    b"b",
    b"u",
    b"s",
    b"e",
    b"t",
    b"\x85",
    b"\x94",
    b"cos\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"r\xff\xff\xff\x0f",
    b"j\xff\xff\xff\x7f",
    b"\x95" + b"\xff" * 8,
    b"B\xff\xff\xff\x7f",
    b"I9\n",
    b"L9L\n",
    b"h\x00",
    b"2",
    b"0",
    b"Q",
    b"\x82\x01",
)


@dataclass(frozen=True)
class Reader:
    """A reader, valid files for it, and pieces that its malformed files contain."""

    valid: Callable[[], Sequence[bytes]]
    read: Callable[[Path], object]  # returns what was read, to compare; None if any content is right
    pieces: Sequence[bytes] = ()


def changed(data: bytes, random: Random, pieces: Sequence[bytes]) -> bytes:
    """A copy of `data` after a few random changes."""
    new = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 4, 16])):
        place = random.randrange(len(new) + 1)
        change = random.randrange(7 if pieces else 6)
        if change == 0 and place < len(new):
            new[place] ^= 1 << random.randrange(8)
        elif change == 1:
            del new[place:]
        elif change == 2:
            del new[place : place + random.randint(1, 64)]
        elif change == 3:
            new[place:place] = random.randbytes(random.randint(1, 16))
        elif change == 4:
            size = random.choice([1, 2, 4, 8])
            number = random.choice(NUMBERS) % (1 << 8 * size)
            new[place : place + size] = number.to_bytes(size, random.choice(["little", "big"]))
        elif change == 5:
            begin = random.randrange(len(new) + 1)
            new[place:place] = new[begin : begin + random.randint(1, 256)]
        elif change == 6:
            new[place:place] = random.choice(pieces)
    return bytes(new)


def read_yaml(path: Path) -> None:
    """Read settings; their values must not contain the environment."""
    from mamlctl.settings.merge import stored_settings
    from mamlctl.settings.presets import load_file

    content = load_file(path)
    if SECRET in repr(content):
        raise ValueError("the settings contain an environment variable")
    stored_settings(str(path), content)


def valid_yaml() -> list[bytes]:
    """Settings files."""
    from mamlctl.settings.presets import to_yaml
    from mamlctl.settings.schema import TrainConfig

    whole = to_yaml(TrainConfig(), TrainConfig()).encode()
    return [b"ways: 5\nalgo: maml\n", b"", whole]


def read_archive(path: Path) -> None:
    """Read every member."""
    from mamlctl.data.reading.archives import open_members

    with open_members(path) as members:
        for name in members.names:
            members.read(name)


def valid_archives() -> list[bytes]:
    """Archives of every supported format, each with three members."""
    files = {f"folder/{number}.png": bytes(range(256)) * number for number in range(3)}
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        found.append(whole.getvalue())
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w", format=form) as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(name + "é" * 30)  # which needs a header of the format's own
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        found.append(whole.getvalue())
    return found + [compress(found[-1]) for compress in (gzip.compress, bz2.compress, lzma.compress)]


def read_pickle(path: Path) -> None:
    """Read arrays."""
    from mamlctl.data.reading.unpickling import load_arrays

    load_arrays(path.read_bytes(), path.name)


def valid_pickles() -> list[bytes]:
    """Pickles of every protocol, like those of CIFAR-100 and mini-ImageNet."""
    content = {
        b"data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "labels": [1, 2, 300, 2**40],
        "class_dict": {"n01": [0, 1], "n02": np.arange(3)},
        "nested": [(1.5, None, "text", b"bytes")],
    }
    return [pickle.dumps(content, protocol) for protocol in range(6)]


def valid_checkpoints() -> list[bytes]:
    """A checkpoint of weights and one of training."""
    import torch

    from mamlctl.engine.training import checkpoints

    weights = {"slow.weight": torch.arange(6.0).view(2, 3), "slow.bias": torch.ones(2)}
    whole = {"stored": weights, "epoch": 1, "val_score": 0.5, "val_ci95": 0.1}
    training = {
        "stored": weights,
        "optimizer": {"exp_avg": weights},
        "period": {"sums": torch.ones(3), "counts": torch.ones(3)},
        "position": {"step": 4, "validated": 1, "top": [[1.0, 0.5, 0.1]]},
    }
    found, path = [], Path(f"valid-{os.getpid()}.pt")
    for content in (whole, training):
        checkpoints.save(path, content, owner="me")
        found.append(path.read_bytes())
    path.unlink()
    return found


def read_checkpoint(path: Path) -> str:
    """Read a checkpoint; what is read must be what was written."""
    from mamlctl.engine.training import checkpoints

    return str(checkpoints.load(path, owner="me"))


READERS = {
    "yaml": Reader(valid_yaml, read_yaml, [piece.encode(errors="replace") for piece in YAML_PIECES]),
    "archive": Reader(valid_archives, read_archive),
    "pickle": Reader(valid_pickles, read_pickle, PICKLE_PIECES),
    "checkpoint": Reader(valid_checkpoints, read_checkpoint, PICKLE_PIECES),
}


def rezipped(data: bytes, random: Random) -> bytes:
    """A checkpoint with a change in one of its records, whose sum of the zip is right."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w") as archive:
        chosen = random.choice(old.namelist())
        for name in old.namelist():
            content = old.read(name)
            archive.writestr(name, changed(content, random, PICKLE_PIECES) if name == chosen else content)
    return new.getvalue()


def limit_memory() -> None:
    """Limit the memory of this process to what it has now, and `MEMORY`."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


class TooSlow(BaseException):
    """The time for a file is over; no Exception, because readers turn those into errors for the user."""


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"a file takes more than {SLOW_S} s")


def losses(kind: str, seed: int, path: Path) -> Iterator[str]:
    """Read `FILES` malformed files and yield what was lost with each, or ""."""
    reader, random = READERS[kind], Random(seed)
    signal.signal(signal.SIGALRM, _too_slow)
    valid = reader.valid()
    whole = []
    for data in valid:
        path.write_bytes(data)
        whole.append(None if kind == "yaml" else reader.read(path))
    for number in range(FILES):
        chosen = random.randrange(len(valid))
        if kind == "checkpoint" and random.random() < 0.7:
            data = rezipped(valid[chosen], random)
        else:
            data = changed(valid[chosen], random, reader.pieces)
        path.write_bytes(data)
        signal.alarm(SLOW_S)
        lost = ""
        try:
            if reader.read(path) != whole[chosen] and whole[chosen] is not None:
                lost = "other content without an error"
        except MamlctlError:
            pass
        except BaseException as error:
            lost = f"{type(error).__name__}: {error}"[:300]
        signal.alarm(0)
        yield f"file {number}: {lost}" if lost else ""


def main() -> None:
    """Print one JSON string per malformed file; the words are a kind, a seed and a path."""
    kind, seed, path = sys.argv[1:]
    os.chdir(Path(path).parent)
    limit_memory()
    for lost in losses(kind, int(seed), Path(path)):
        sys.stdout.write(json.dumps(lost) + "\n")
        sys.stdout.flush()


def fuzz(kind: str, undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Read malformed files of a kind in another process."""
    suffix = {"yaml": ".yaml", "checkpoint": ".pt"}.get(kind, "")
    words = [kind, str(random.getrandbits(32)), str(folder / f"malformed{suffix}")]
    os.environ["SECRET"] = SECRET
    ended = Running(words, folder, PROGRAM).end()
    found = [json.loads(line) for line in ended.out.splitlines()]
    yield from found
    if ended.code or len(found) != FILES:
        yield f"the reader ended with {ended.code} at file {len(found)}: {ended.err.strip()[-300:]}"


fuzz_yaml, fuzz_archive, fuzz_pickle, fuzz_checkpoint = (partial(fuzz, kind) for kind in READERS)

"""The C functions of `c/`, compiled by the machine's C compiler once for each dtype.

That takes about 2 s; the compiled library is then in the cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
import torch
from torch import Tensor

from mamlctl.engine.devices import cpu_line
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS

SOURCES = Path(__file__).parent / "c"
TYPES = {torch.float32: "FLOAT32", torch.float64: "FLOAT64", torch.bfloat16: "BFLOAT16"}

# Not every compiler and processor supports these options. Each failure drops the last one and retries.
TUNING = ("-march=native", "-mprefer-vector-width=512")
OPTIONS = (
    "-std=gnu11",
    "-O3",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

LARGEST = 2**26  # bytes of a library; ours have about 100,000

_before_compiling: list[Callable[[], None]] = []  # called before each compilation
_uncached: list[str] = []  # why a library had to be compiled outside of the cache folder


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the compiled functions for tensors stored in `dtype`; None if they cannot be compiled."""
    if dtype not in TYPES:
        return None
    sources = sorted(SOURCES.glob("*.[ch]"))
    compiler = shlex.split(os.environ.get("CC", ""))
    texts = [source.read_text(encoding="utf-8") for source in sources]
    ingredients = [*texts, *OPTIONS, *TUNING, *compiler, platform.machine(), processor()]
    name = f"{TYPES[dtype].lower()}-{_digest(chr(0).join(ingredients).encode())}"
    folder = platformdirs.user_cache_path("mamlctl") / "native"
    cached = _cached(folder, name)
    return cached or _build([compiler or ["cc"], ["cc"]], TYPES[dtype], sources, folder, name)


@contextmanager
def compilation(begins: Callable[[], None]) -> Iterator[None]:
    """Call `begins` before each compilation in the block, so that it can be shown that this takes time."""
    _before_compiling.append(begins)
    try:
        yield
    finally:
        _before_compiling.remove(begins)


def compiled_at_every_start() -> str | None:
    """Return why the cache folder is not used, and what to do about it; None if it is used."""
    if not _uncached:
        return None
    return f"compiling C kernels at every start, because {_uncached[0]}: set XDG_CACHE_HOME to another folder"


def _cached(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load a cached library; None if it is missing, damaged, or in reach of another user."""
    for path in folder.glob(f"{name}-*.so"):
        with suppress(OSError):
            # Reading anything but a file of a known size, such as a pipe, may never end.
            if not path.is_file() or path.stat().st_size > LARGEST:
                continue
            # A truncated library would crash the process, so its name contains the digest of its bytes.
            if path.stem.endswith(_digest(path.read_bytes())) and _is_private(path):
                return _load(path)
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_private(path: Path) -> bool:
    """Whether only this user and root can change a path, or replace a folder that contains it."""
    if not hasattr(os, "geteuid"):  # Windows, where the cache folder is in the user's own profile
        return True
    path, unknown = path.resolve(), _unknown_owner()
    for place in (path, *path.parents):
        status = place.stat()
        if place != path and status.st_uid == unknown and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            continue  # probably root of the host, as for / and /home
        # Many systems give each user a group of their own, with the user's number.
        shared = stat.S_IWOTH | (0 if status.st_gid == status.st_uid else stat.S_IWGRP)
        # Others may create files in a folder with this bit, e.g. /tmp, but not replace those of this user.
        sticky = place != path and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & shared and not sticky):
            return False
    return True


def _unknown_owner() -> int | None:
    """The number that a Linux user namespace shows for users outside of it; None outside of namespaces."""
    with suppress(OSError, ValueError):  # not Linux
        if Path("/proc/self/uid_map").read_text(encoding="utf-8").split() != ["0", "0", str(2**32 - 1)]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="utf-8"))
    return None


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # missing, not a library, or in a folder that is mounted noexec
        return None


def _build(
    compilers: list[list[str]], kind: str, sources: list[Path], cache: Path, name: str
) -> ctypes.CDLL | None:
    """Compile and load, trying each compiler with fewer and fewer options; cache the library if possible."""
    for begins in _before_compiling:
        begins()
    programs = [str(source) for source in sources if source.suffix == ".c"]
    reason = f"the C compiler fails in {cache}"  # for example because its disk is full
    for folder in (cache, None):
        try:
            if folder is not None:
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                if not _is_private(folder):
                    reason = f"other users can change {folder}"
                    continue
                _remove_abandoned(folder)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                built = Path(scratch) / "built.so"
                for compiler, last in itertools.product(compilers, range(len(TUNING), -1, -1)):
                    words = [*compiler, *OPTIONS, *TUNING[:last], f"-D{kind}", "-o", str(built), *programs]
                    if not _succeeds(words):
                        continue
                    if (loaded := _load(built)) is None:
                        reason = f"programs cannot be run from {cache}"
                        continue
                    if folder is None:
                        _uncached.append(reason)
                    else:
                        _keep(built, folder, name)
                    return loaded
        except OSError as error:
            reason = f"{cache} cannot be written ({error.strerror})"
    return None


def _keep(built: Path, folder: Path, name: str) -> None:
    """Move a compiled library to the cache folder."""
    with built.open("r+b") as file:
        os.fsync(file.fileno())
    built.chmod(0o700)
    target = folder / f"{name}-{_digest(built.read_bytes())}.so"
    if target.is_dir() and not target.is_symlink():  # which no file can replace
        shutil.rmtree(target)
    built.replace(target)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed processes have left in the cache folder; no compilation takes an hour."""
    for scratch in folder.glob("tmp*"):
        with suppress(FileNotFoundError):  # another process has just finished with it
            if time.time() - scratch.stat().st_mtime > 3600:
                shutil.rmtree(scratch, ignore_errors=True)


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def processor() -> str:
    """Return a string that identifies the processor's instruction set; "" if it is unknown."""
    return cpu_line("flags", "Features") or platform.processor()


def lacks_bfloat16() -> bool:
    """Whether the processor is known to have no bfloat16 instructions."""
    flags = processor().split()
    return flags[:1] == ["flags"] and not {"avx512_bf16", "amx_bf16"} & set(flags)


class BlockShape(ctypes.Structure):
    """The struct `shape` of c/common.h."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("examples", "height", "width", "channels")),
        *((name, ctypes.c_int) for name in ("threads", "measured", "tasks", "inputs")),
        ("eps", ctypes.c_double),
        ("leak", ctypes.c_double),
    ]


def shape_of(x: Tensor, channels: int, measured: int, tasks: int, leak: float = LEAK) -> BlockShape:
    """Describe a block for the kernels.

    Args:
        x: the input, [E, T * C_in, H, W].
        channels: X, the number of output channels of all tasks.
        measured: how many leading examples the statistics come from.
        tasks: T.
        leak: the slope of the activation below 0.
    """
    examples, inputs, height, width = x.shape
    sizes = examples, height, width, channels, torch.get_num_threads(), measured, tasks, inputs // tasks
    return BlockShape(*sizes, EPS, leak)


def call(stored: torch.dtype, name: str, shape: BlockShape, *tensors: Tensor | None) -> None:
    """Call a compiled function.

    Args:
        stored: the dtype of its large tensors.
        name: of the function.
        shape: its first argument.
        tensors: the other ones. It gets pointers only, so the tensors must be contiguous.
    """
    compiled = library(stored)
    assert compiled is not None
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    getattr(compiled, name)(ctypes.byref(shape), *pointers)

"""The block of `block.py` in C for CPUs, with fewer passes over memory than torch operations.

The machine's C compiler compiles `c/` once for each dtype (about 2 s) into the cache folder. Without a
compiler torch operations do the same work, more slowly.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.devices import cpu_line
from mamlctl.engine.kernels.block import BlockGradient, BlockSettings, Planes
from mamlctl.engine.kernels.fused_block import (
    BlockMemory,
    BlockShape,
    ChannelRow,
    KernelTape,
    TangentTensors,
    shape_of,
)

SOURCES = Path(__file__).parent / "c"
TYPES = {torch.float32: "FLOAT32", torch.float64: "FLOAT64", torch.bfloat16: "BFLOAT16"}

# Not every compiler and processor supports these options. Each failure drops the last one and retries.
TUNING = ("-march=native", "-mprefer-vector-width=512")
OPTIONS = (
    "-std=gnu11",
    "-O3",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

VEC = 16  # filters per vector in the first block, as in c/first.c

_uncached: list[str] = []  # why a library had to be compiled outside of the cache folder


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the compiled functions for tensors stored in `dtype`; None if they cannot be compiled."""
    if dtype not in TYPES:
        return None
    sources = sorted(SOURCES.glob("*.[ch]"))
    compiler = shlex.split(os.environ.get("CC", ""))
    texts = [source.read_text() for source in sources]
    ingredients = [*texts, *OPTIONS, *compiler, platform.machine(), processor()]
    name = f"{TYPES[dtype].lower()}-{_digest(chr(0).join(ingredients).encode())}"
    folder = platformdirs.user_cache_path("mamlctl") / "native"
    cached = _cached(folder, name)
    return cached or _build([compiler or ["cc"], ["cc"]], TYPES[dtype], sources, folder, name)


def compiled_at_every_start() -> str | None:
    """Return why the cache folder is not used, and what to do about it; None if it is used."""
    if not _uncached:
        return None
    return f"compiling C kernels at every start, because {_uncached[0]}: set XDG_CACHE_HOME to another folder"


def _cached(folder: Path, name: str) -> ctypes.CDLL | None:
    """Load a cached library; None if it is missing, damaged, or in reach of another user."""
    with suppress(OSError):
        for path in folder.glob(f"{name}-*.so"):
            # A truncated library would crash the process, so its name contains the digest of its bytes.
            if path.stem.endswith(_digest(path.read_bytes())) and _is_private(path):
                return _load(path)
    return None


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _is_private(path: Path) -> bool:
    """Whether only this user and root can change a path, or replace a folder that contains it."""
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
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text())
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
                    else:
                        if folder is None:
                            _uncached.append(reason)
                            return loaded
                        with built.open("rb") as file:
                            os.fsync(file.fileno())
                        built.chmod(0o700)
                        built.replace(folder / f"{name}-{_digest(built.read_bytes())}.so")
                        return loaded
        except OSError as error:
            reason = f"{cache} cannot be written ({error.strerror})"
    return None


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


def prepare(x: Tensor, tasks: int, measured: int | None) -> Planes:
    """Compute the planes and patch moments of a set, once for all inner steps.

    Args:
        x: the images, [E, T * C, H, W].
        tasks: T.
        measured: how many leading examples the moments come from; None for all.
    """
    examples, channels, height, width = x.shape
    inputs = channels // tasks
    planes = F.pad(x.view(examples, tasks, inputs, height, width), (1, 1, 1, 1)).contiguous()
    count = examples if measured is None else measured
    shape = shape_of(x, 0, count, tasks)
    mean_TD1 = torch.empty(tasks, 9 * inputs, 1, dtype=torch.float64)
    covariance_TDD = torch.empty(tasks, 9 * inputs, 9 * inputs, dtype=torch.float64)
    _call(x.dtype, "patch_sums", shape, planes, mean_TD1, covariance_TDD)
    mean_TD1 /= count * height * width
    covariance_TDD /= count * height * width
    covariance_TDD -= mean_TD1 @ mean_TD1.transpose(1, 2)  # cov(q) = <q q^T> - <q> <q>^T
    return Planes(planes, mean_TD1, covariance_TDD)


@dataclass(frozen=True)
class Native:
    """The kernels of c/block.c for tensors stored in one dtype; implements `fused_block.Kernels`."""

    stored: torch.dtype

    def partial_rows(self, shape: BlockShape) -> int:
        return int(shape.examples)  # one partial sum for each example

    def forward(self, block: BlockMemory, c: Tensor, out: Tensor) -> None:
        self._call("forward", block, c, block.p, block.where, out)

    def backward(self, block: BlockMemory, ga: Tensor, c: Tensor, gc: Tensor) -> None:
        self._call("backward", block, ga, block.p, block.where, c, gc)

    def tangent(
        self, block: BlockMemory, c_t: Tensor, other: Tensor | None, c: Tensor, p_t: Tensor, a_t: Tensor
    ) -> None:
        self._call("tangent", block, c_t, other, c, block.p, block.where, p_t, a_t)

    def tangent_backward(self, block: BlockMemory, tensors: TangentTensors) -> None:
        t = tensors
        pooled = t.ga_t, t.other, t.ga, block.p, t.p_t, block.where
        self._call("tangent_backward", block, *pooled, t.c, t.c_t)

    def _call(self, name: str, block: BlockMemory, *tensors: Tensor | None) -> None:
        # All functions of c/block.c end with these two arguments.
        _call(self.stored, name, block.shape, *tensors, block.d, block.partial)


class NativeFirstTape(KernelTape):
    """The first block, including its convolution. Its output c, the largest tensor, is never stored.

    Let w be a filter (D = 9 C values) and q a 3x3 patch of the image, so that c = w . q. With <q> the mean
    and cov(q) the covariance of the patches, which never change,

        mean = w . <q>        var = w . cov(q) w

    The gradient of w is the sum over all patches of gc q. With gc from `block.py`, the part of it that does
    not come from the selected places is

        slope sum c q + offset sum q = M slope cov(q) w - s b <q>

    because sum c q = M (cov(q) + <q> <q>^T) w, sum q = M <q> and M offset = -s b - M slope mean. Tangents
    follow by the product rule, with var_t = 2 w_t . cov(q) w.
    """

    def _forward(self) -> None:
        assert self.settings.planes is not None
        self.planes, block = self.settings.planes, self.block
        weight_TDO = self._by_patch(self.weight)
        self.along_TDO = self.planes.covariance_TDD @ weight_TDO  # cov(q) w
        if block.shape.measured:
            block.d[ChannelRow.MEAN] = _inner(self.planes.mean_TD1, weight_TDO)
            # Rounding can make the variance of a constant image negative.
            block.d[ChannelRow.VAR] = _inner(self.along_TDO, weight_TDO).clamp_(min=0)
        self._call("first_forward", self._padded(weight_TDO), block.p, block.where, self.out, block.d)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        self.ga, gw, block = ga.to(self.stored), self._empty_padded(), self.block
        self._call("first_backward", self.ga, block.p, block.where, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        # `gw` is the part of the gradient that comes from the selected places; this is the other part.
        statistics_TDO = self.count * slope * self.along_TDO - s * b * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G, ChannelRow.B)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        weight_TDO, block = self._by_patch(weight_t), self.block
        self.along_t_TDO = self.planes.covariance_TDD @ weight_TDO
        block.d[ChannelRow.MEAN_T] = _inner(self.planes.mean_TD1, weight_TDO)
        block.d[ChannelRow.S_T] = 2 * _inner(self.along_TDO, weight_TDO)  # var_t; first_tangent makes it s_t
        self.p_t, a_t = self._empty(), self._empty()
        self._call("first_tangent", self._padded(weight_TDO), block.p, block.where, self.p_t, a_t, block.d)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t, gw, block = ga_t.to(self.stored), self._empty_padded(), self.block
        pooled = ga_t, other, self.ga, block.p, self.p_t, block.where
        self._call("first_tangent_backward", *pooled, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        s_t, slope_t, b_t = (self._d_row(row) for row in (ChannelRow.S_T, ChannelRow.SLOPE_T, ChannelRow.B_T))
        # The tangent of M slope cov(q) w - s b <q>.
        statistics_TDO = self.count * (slope_t * self.along_TDO + slope * self.along_t_TDO)
        statistics_TDO -= (s_t * b + s * b_t) * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        # These functions of c/first.c all begin with the planes.
        _call(self.stored, name, self.block.shape, self.planes.x, *tensors)

    def _d_row(self, row: ChannelRow) -> Tensor:
        """Return a row of `d` as _T1O, to be multiplied with _TDO."""
        return self.block.d[row].view(self.settings.groups, 1, -1)

    def _by_patch(self, weight: Tensor) -> Tensor:
        """Reshape filters [X, C, 3, 3] to _TDO, in float64 because statistics are computed from them."""
        patch = self.block.shape.inputs * 9
        return weight.double().view(self.settings.groups, -1, patch).transpose(1, 2)

    def _by_filter(self, gw: Tensor, statistics_TDO: Tensor) -> Tensor:
        """Add both parts of the filters' gradient -> [X, C, 3, 3] in the dtype of batch norm."""
        gw_TDO = gw[:, :, : statistics_TDO.shape[2]] + statistics_TDO
        return gw_TDO.transpose(1, 2).reshape(-1, self.block.shape.inputs, 3, 3).to(self.type)

    def _padded(self, weight_TDO: Tensor) -> Tensor:
        """Append filters of zeros up to a multiple of VEC."""
        filters = weight_TDO.shape[2]
        return F.pad(weight_TDO, (0, -filters % VEC)).to(self.type).contiguous()

    def _empty_padded(self) -> Tensor:
        """Allocate the gradient of padded filters."""
        shape, tasks = self.block.shape, self.settings.groups
        filters = shape.channels // tasks
        return torch.empty(tasks, shape.inputs * 9, filters + -filters % VEC, dtype=self.type)


def _inner(a_TDO: Tensor, b_TDO: Tensor) -> Tensor:
    """Compute the inner product over the patch axis D -> _X."""
    return (a_TDO * b_TDO).sum(1).flatten()


def native_block(
    x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
) -> KernelTape:
    """Compute a block's forward pass in C; arguments as in `block.MakeBlock`."""
    tape = NativeFirstTape if settings.first else KernelTape
    return tape(x, weight, gamma_X, beta_X, settings, Native(settings.compute or weight.dtype))


def _call(stored: torch.dtype, name: str, shape: BlockShape, *tensors: Tensor | None) -> None:
    """Call a compiled function; it gets pointers only, so the tensors must be contiguous."""
    compiled = library(stored)
    assert compiled is not None
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    getattr(compiled, name)(ctypes.byref(shape), *pointers)

"""The blocks of `blocks.py` in C on a CPU: fewer passes over the data, bfloat16 where the processor has it.

`c/` is compiled once for each type by the machine's C compiler (about 2 s) into the cache folder. Where
there is none, torch's own operations do the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import torch
import torch.nn.functional as F
from torch import Tensor

from mamlctl.engine.devices import cpu_line
from mamlctl.engine.kernels.block import BlockGradient
from mamlctl.engine.kernels.fused_block import BlockShape, ChannelRow, KernelTape, shape_of

SOURCES = Path(__file__).parent / "c"

TYPES = {torch.float32: "FLOAT32", torch.float64: "FLOAT64", torch.bfloat16: "BFLOAT16"}

# Options that not every compiler and processor knows are left out one after another, the last first.
TUNING = ("-march=native", "-mprefer-vector-width=512")

OPTIONS = (
    "-std=gnu11",
    "-O3",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)

SIX = ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B, ChannelRow.S_T, ChannelRow.SLOPE_T, ChannelRow.B_T

VEC = 16  # filters side by side in the first block, as in c/first.c


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for tensors stored in `dtype`, or None where they cannot be had."""
    if dtype not in TYPES:
        return None
    sources = sorted(SOURCES.glob("*.[ch]"))
    given = shlex.split(os.environ.get("CC", ""))
    made_of = [*(source.read_text() for source in sources), *OPTIONS, *given, platform.machine(), processor()]
    name = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    path = platformdirs.user_cache_path("mamlctl") / "native" / f"{TYPES[dtype].lower()}-{name}.so"
    return _load(path) or _build([given or ["cc"], ["cc"]], TYPES[dtype], sources, path)


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # absent, no library, or in a folder that allows no programs
        return None


def _build(compilers: list[list[str]], kind: str, sources: list[Path], path: Path) -> ctypes.CDLL | None:
    """Compile and load: with every compiler, with fewer and fewer options; kept at `path` if that can be."""
    programs = [str(source) for source in sources if source.suffix == ".c"]
    for folder in (path.parent, None):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "made.so"
                for compiler, last in itertools.product(compilers, range(len(TUNING), -1, -1)):
                    words = [*compiler, *OPTIONS, *TUNING[:last], f"-D{kind}", "-o", str(made), *programs]
                    if _succeeds(words) and (loaded := _load(made)) is not None:
                        with made.open("rb") as file:
                            os.fsync(file.fileno())
                        if folder is not None:
                            made.replace(path)
                        return loaded
        except OSError:  # a cache folder that cannot be written: without it then
            continue
    return None


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def processor() -> str:
    """What tells one processor's instructions from another's; empty where that is not known."""
    return cpu_line("flags", "Features") or platform.processor()


def lacks_bfloat16() -> bool:
    """Whether this is known to be a processor without products of bfloat16."""
    flags = processor().split()
    return flags[:1] == ["flags"] and not {"avx512_bf16", "amx_bf16"} & set(flags)


@dataclass(frozen=True)
class Planes:
    """What the first block wants of a set: padded planes, and the patches' first two moments by task."""

    x: Tensor  # [E, T, C, H + 2, W + 2]
    mean_TD1: Tensor  # D = 9 C numbers a patch; float64
    covariance_TDD: Tensor


def prepare(x: Tensor, tasks: int, measured: int | None) -> Planes:
    """Planes and moments of a set [E, T * C, H, W]; the moments of the leading `measured` examples."""
    examples, channels, height, width = x.shape
    inputs = channels // tasks
    planes = F.pad(x.view(examples, tasks, inputs, height, width), (1, 1, 1, 1)).contiguous()
    behind = examples if measured is None else measured
    shape = shape_of(x, 0, behind, tasks)
    mean_TD1 = torch.empty(tasks, 9 * inputs, 1, dtype=torch.float64)
    covariance_TDD = torch.empty(tasks, 9 * inputs, 9 * inputs, dtype=torch.float64)
    _call(x.dtype, "patch_sums", shape, planes, mean_TD1, covariance_TDD)
    mean_TD1 /= behind * height * width
    covariance_TDD /= behind * height * width
    covariance_TDD -= mean_TD1 @ mean_TD1.transpose(1, 2)
    return Planes(planes, mean_TD1, covariance_TDD)


@dataclass(frozen=True)
class Native:
    """The kernels of c/block.c for tensors stored in a type; `kernels.Kernels`."""

    stored: torch.dtype

    def partial_rows(self, shape: BlockShape) -> int:
        """Sums are joined by example."""
        return int(shape.examples)

    def forward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        _call(self.stored, "forward", shape, *tensors)

    def backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        _call(self.stored, "backward", shape, *tensors)

    def tangent(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        _call(self.stored, "tangent", shape, *tensors)

    def tangent_backward(self, shape: BlockShape, *tensors: Tensor | None) -> None:
        """See `Kernels`."""
        _call(self.stored, "tangent_backward", shape, *tensors)


class NativeFirstTape(KernelTape):
    """The first block, convolution included: its unpooled output, the largest tensor, is never written.

    Its statistics, and the part of the weights' gradient that they carry, follow from the moments of the
    image's patches, which never change: with q a patch, mean = W <q> and var = W cov(q) W.
    """

    def _forward(self, extra: Planes) -> None:
        self.planes = extra
        weight_TDO = self._by_patch(self.weight)
        self.along_TDO = extra.covariance_TDD @ weight_TDO
        if self.shape.measured:
            self.d[ChannelRow.MEAN] = _inner(extra.mean_TD1, weight_TDO)
            self.d[ChannelRow.VAR] = _inner(self.along_TDO, weight_TDO).clamp_(
                min=0
            )  # rounding of a flat image
        outs = self.p, self.where, self.out
        _call(self.stored, "first_forward", self.shape, extra.x, self._padded(weight_TDO), *outs, self.d)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        """First derivatives; no gradient by the image."""
        self.ga, gw = ga.to(self.stored), self._empty_padded()
        parts = self.planes.x, self.ga, self.p, self.where
        _call(self.stored, "first_backward", self.shape, *parts, self.d, self.partial, gw)
        s, slope, b = self._row(ChannelRow.S), self._row(ChannelRow.SLOPE), self._row(ChannelRow.B)
        statistics = self.count * slope * self.along_TDO - s * b * self.planes.mean_TD1
        return self._gradient(None, self._by_filter(gw, statistics), ChannelRow.G, ChannelRow.B)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        """Forward tangent."""
        weight_TDO = self._by_patch(weight_t)
        self.along_t_TDO = self.planes.covariance_TDD @ weight_TDO
        self.d[ChannelRow.MEAN_T] = _inner(self.planes.mean_TD1, weight_TDO)
        self.d[ChannelRow.S_T] = 2 * _inner(self.along_TDO, weight_TDO)  # var_t, from which C goes on
        self.p_t, a_t = self._empty(), self._empty()
        parts = self.planes.x, self._padded(weight_TDO), self.p, self.where, self.p_t, a_t
        _call(self.stored, "first_tangent", self.shape, *parts, self.d)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        """Second derivatives."""
        ga_t, gw = ga_t.to(self.stored), self._empty_padded()
        parts = self.planes.x, ga_t, other, self.ga, self.p, self.p_t, self.where
        _call(self.stored, "first_tangent_backward", self.shape, *parts, self.d, self.partial, gw)
        s, slope, b, s_t, slope_t, b_t = (self._row(row) for row in SIX)
        statistics = self.count * (slope_t * self.along_TDO + slope * self.along_t_TDO)
        statistics -= (s_t * b + s * b_t) * self.planes.mean_TD1
        return self._gradient(None, self._by_filter(gw, statistics), ChannelRow.G_T, ChannelRow.B_T)

    def _row(self, row: int) -> Tensor:
        return self.d[row].view(self.groups, 1, -1)

    def _by_patch(self, weight: Tensor) -> Tensor:
        """[X, C, 3, 3] -> _TDO in float64, the type of all that statistics are made of."""
        return weight.double().view(self.groups, -1, self.shape.inputs * 9).transpose(1, 2)

    def _by_filter(self, gw: Tensor, statistics_TDO: Tensor) -> Tensor:
        gw_TDO = gw[:, :, : statistics_TDO.shape[2]] + statistics_TDO
        return gw_TDO.transpose(1, 2).reshape(-1, self.shape.inputs, 3, 3)

    def _padded(self, weight_TDO: Tensor) -> Tensor:
        filters = weight_TDO.shape[2]
        return F.pad(weight_TDO, (0, -filters % VEC)).to(self.type).contiguous()

    def _empty_padded(self) -> Tensor:
        tasks, filters = self.groups, self.shape.channels // self.groups
        return torch.empty(tasks, self.shape.inputs * 9, filters + -filters % VEC, dtype=self.type)


def _inner(a_TDO: Tensor, b_TDO: Tensor) -> Tensor:
    """Inner product over the patch -> _X."""
    return (a_TDO * b_TDO).sum(1).flatten()


def native_block(x: Tensor, weight: Tensor, *args: Any, **settings: Any) -> KernelTape:
    """A block in C: `blocks.TorchTape`'s arguments."""
    kernels = Native(settings["compute"] or weight.dtype)
    return (NativeFirstTape if settings["first"] else KernelTape)(
        x, weight, *args, kernels=kernels, **settings
    )


def _call(stored: torch.dtype, name: str, shape: BlockShape, *tensors: Tensor | None) -> None:
    """Call a compiled function. The tensors must be whole: it sees their memory only."""
    found = library(stored)
    assert found is not None
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    getattr(found, name)(ctypes.byref(shape), *pointers)

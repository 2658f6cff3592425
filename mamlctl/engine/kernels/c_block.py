"""The blocks of `block.py` in C on a CPU: fewer passes over the data, bfloat16 where the processor has it.

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

VEC = 16  # filters side by side in the first block, as in c/first.c


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled functions for tensors stored in `dtype`, or None where they cannot be had."""
    if dtype not in TYPES:
        return None
    sources = sorted(SOURCES.glob("*.[ch]"))
    compiler = shlex.split(os.environ.get("CC", ""))
    texts = [source.read_text() for source in sources]
    ingredients = [*texts, *OPTIONS, *compiler, platform.machine(), processor()]
    name = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    path = platformdirs.user_cache_path("mamlctl") / "native" / f"{TYPES[dtype].lower()}-{name}.so"
    return _load(path) or _build([compiler or ["cc"], ["cc"]], TYPES[dtype], sources, path)


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
                built = Path(scratch) / "built.so"
                for compiler, last in itertools.product(compilers, range(len(TUNING), -1, -1)):
                    words = [*compiler, *OPTIONS, *TUNING[:last], f"-D{kind}", "-o", str(built), *programs]
                    if _succeeds(words) and (loaded := _load(built)) is not None:
                        with built.open("rb") as file:
                            os.fsync(file.fileno())
                        if folder is not None:
                            built.replace(path)
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


def prepare(x: Tensor, tasks: int, measured: int | None) -> Planes:
    """Planes and moments of a set [E, T * C, H, W]; the moments of the leading `measured` examples."""
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
    covariance_TDD -= mean_TD1 @ mean_TD1.transpose(1, 2)
    return Planes(planes, mean_TD1, covariance_TDD)


@dataclass(frozen=True)
class Native:
    """The kernels of c/block.c for tensors stored in a type; `fused_block.Kernels`."""

    stored: torch.dtype

    def partial_rows(self, shape: BlockShape) -> int:
        """Sums are joined by example."""
        return int(shape.examples)

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
        """The functions of c/block.c end with the channels' numbers and the partial sums."""
        _call(self.stored, name, block.shape, *tensors, block.d, block.partial)


class NativeFirstTape(KernelTape):
    """The first block, convolution included: its unpooled output, the largest tensor, is never written.

    Its statistics, and the part of the weights' gradient that they carry, follow from the moments of the
    image's patches, which never change: with q a patch, mean = W <q> and var = W cov(q) W.
    """

    def _forward(self) -> None:
        assert self.settings.planes is not None
        self.planes, block = self.settings.planes, self.block
        weight_TDO = self._by_patch(self.weight)
        self.along_TDO = self.planes.covariance_TDD @ weight_TDO
        if block.shape.measured:
            block.d[ChannelRow.MEAN] = _inner(self.planes.mean_TD1, weight_TDO)
            # Rounding can make the variance of a flat image negative.
            block.d[ChannelRow.VAR] = _inner(self.along_TDO, weight_TDO).clamp_(min=0)
        self._call("first_forward", self._padded(weight_TDO), block.p, block.where, self.out, block.d)

    def backward(self, ga: Tensor, *, keep: bool) -> BlockGradient:
        """First derivatives; no gradient by the image."""
        self.ga, gw, block = ga.to(self.stored), self._empty_padded(), self.block
        self._call("first_backward", self.ga, block.p, block.where, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        # By the weight through the statistics, in addition to `gw`, which is through the pooled values.
        statistics_TDO = self.count * slope * self.along_TDO - s * b * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G, ChannelRow.B)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def tangent(self, x_t: Tensor | None, weight_t: Tensor) -> Tensor:
        weight_TDO, block = self._by_patch(weight_t), self.block
        self.along_t_TDO = self.planes.covariance_TDD @ weight_TDO
        block.d[ChannelRow.MEAN_T] = _inner(self.planes.mean_TD1, weight_TDO)
        block.d[ChannelRow.S_T] = 2 * _inner(self.along_TDO, weight_TDO)  # var_t, from which C goes on
        self.p_t, a_t = self._empty(), self._empty()
        self._call("first_tangent", self._padded(weight_TDO), block.p, block.where, self.p_t, a_t, block.d)
        return a_t

    def tangent_backward(self, ga_t: Tensor, other: Tensor | None = None) -> BlockGradient:
        ga_t, gw, block = ga_t.to(self.stored), self._empty_padded(), self.block
        pooled = ga_t, other, self.ga, block.p, self.p_t, block.where
        self._call("first_tangent_backward", *pooled, block.d, block.partial, gw)
        s, slope, b = (self._d_row(row) for row in (ChannelRow.S, ChannelRow.SLOPE, ChannelRow.B))
        s_t, slope_t, b_t = (self._d_row(row) for row in (ChannelRow.S_T, ChannelRow.SLOPE_T, ChannelRow.B_T))
        statistics_TDO = self.count * (slope_t * self.along_TDO + slope * self.along_t_TDO)
        statistics_TDO -= (s_t * b + s * b_t) * self.planes.mean_TD1
        by_norm = self._of_norm(ChannelRow.G_T, ChannelRow.B_T)
        return BlockGradient(None, self._by_filter(gw, statistics_TDO), *by_norm)

    def _call(self, name: str, *tensors: Tensor | None) -> None:
        """The functions of c/first.c begin with the planes."""
        _call(self.stored, name, self.block.shape, self.planes.x, *tensors)

    def _d_row(self, row: ChannelRow) -> Tensor:
        """A row of `d`, to be multiplied with _TDO."""
        return self.block.d[row].view(self.settings.groups, 1, -1)

    def _by_patch(self, weight: Tensor) -> Tensor:
        """[X, C, 3, 3] -> _TDO in float64, the type of all that statistics are made of."""
        patch = self.block.shape.inputs * 9
        return weight.double().view(self.settings.groups, -1, patch).transpose(1, 2)

    def _by_filter(self, gw: Tensor, statistics_TDO: Tensor) -> Tensor:
        """The reverse of `_by_patch`, of both parts of the weight's gradient, in the type of the norm."""
        gw_TDO = gw[:, :, : statistics_TDO.shape[2]] + statistics_TDO
        return gw_TDO.transpose(1, 2).reshape(-1, self.block.shape.inputs, 3, 3).to(self.type)

    def _padded(self, weight_TDO: Tensor) -> Tensor:
        """With filters of zeros up to a multiple of VEC."""
        filters = weight_TDO.shape[2]
        return F.pad(weight_TDO, (0, -filters % VEC)).to(self.type).contiguous()

    def _empty_padded(self) -> Tensor:
        """Room for the gradient of a padded weight."""
        shape, tasks = self.block.shape, self.settings.groups
        filters = shape.channels // tasks
        return torch.empty(tasks, shape.inputs * 9, filters + -filters % VEC, dtype=self.type)


def _inner(a_TDO: Tensor, b_TDO: Tensor) -> Tensor:
    """Inner product over the patch -> _X."""
    return (a_TDO * b_TDO).sum(1).flatten()


def native_block(
    x: Tensor, weight: Tensor, gamma_X: Tensor, beta_X: Tensor, settings: BlockSettings
) -> KernelTape:
    """A block in C; see `block.MakeBlock`."""
    tape = NativeFirstTape if settings.first else KernelTape
    return tape(x, weight, gamma_X, beta_X, settings, Native(settings.compute or weight.dtype))


def _call(stored: torch.dtype, name: str, shape: BlockShape, *tensors: Tensor | None) -> None:
    """Call a compiled function. The tensors must be whole: it sees their memory only."""
    compiled = library(stored)
    assert compiled is not None
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    getattr(compiled, name)(ctypes.byref(shape), *pointers)

"""Triton kernels as operators of torch, which also run on fake tensors: those have shapes but no memory.

An operator has the two sizes of the grid, then the arguments of its kernel. It returns nothing and writes to
the tensors that are listed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl

from mamlctl.engine.kernels.triton import block_kernels as inner
from mamlctl.engine.kernels.triton import conv_kernels as products
from mamlctl.engine.kernels.triton import first_kernels as first
from mamlctl.engine.kernels.triton import head_kernels as head

# Sizes of the programs, chosen on an H200.
CHANNELS, GROUP = 32, 16  # channels and pooling windows of an inner block that are computed at a time
MOST_TILES = 65535  # CUDA's limit of the second size of a grid: tiles of channels, each with a ticket
VALUES = 1024  # pooled values of a program that handles each of them alone
ROWS = 64  # rows of partial sums that are added at a time
FILTERS, WINDOWS = 32, 16  # filters and pooling windows of the first block that are computed at a time
FEATURES = 16  # features that the head reads at a time
# Warps of the head, whose programs hold all classes, and registers per thread: ptxas chooses fewer.
HEAD_WARPS, HEAD_REGISTERS = 8, 224

# Arguments of kernels that are numbers, and tensors that may be None. All others are tensors.
INTEGERS = frozenset(("measured", "norms", "items", "total", "GIVEN", *"HWXTFECNPMK"))
CONSTANTS = frozenset(("BACK", "TF32", "PARTS", "BP", "BO", "BI"))  # numbers that are compiled into a kernel
REALS = frozenset(("count", "eps", "leak"))
OPTIONAL = frozenset(("x2", "w2", "g2"))
DERIVED = frozenset(
    ("TWO", "REAL", "BD", "BX", "BW", "BV", "RS", "RP", "BE", "BN", "BF")
)  # computed here, not arguments of operators


def argument_names(kernel: Any) -> list[str]:
    """Return the names of the kernel's arguments, except those that `constants` computes."""
    return [name for name in inspect.signature(kernel.fn).parameters if name not in DERIVED]


def constants(kernel: Any, values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the compile-time constants of a kernel that follow from its arguments.

    Args:
        kernel: the kernel.
        values: its arguments by name.
        dtype: in which p is stored, or the head's probabilities.
    """
    is_first = "C" in values
    derived = {
        "TWO": any(values.get(name) is not None for name in OPTIONAL),
        "REAL": tl.float64 if dtype == torch.float64 else tl.float32,
        "BD": tile(9 * values.get("C", 1)),
        "BE": tile(values.get("E", 1)),
        "BN": tile(values.get("N", 1)),
        "BF": FEATURES,
        "BX": FILTERS if is_first else CHANNELS,
        "BW": WINDOWS if is_first else GROUP,
        "BV": VALUES,
        "RS": ROWS,
        "RP": 128 // tile(9 * values.get("C", 1)),
    }
    return {name: derived[name] for name in inspect.signature(kernel.fn).parameters if name in DERIVED}


def tile(size: int) -> int:
    """Return the smallest tile of a matrix product with this many rows or columns: a power of 2."""
    return max(16, 1 << (size - 1).bit_length())


def options(kernel: Any) -> dict[str, int]:
    """Return the compiler's options for a kernel."""
    names = inspect.signature(kernel.fn).parameters.keys()
    if "BP" in names:
        return {"num_warps": 4, "num_stages": 3}
    if "N" in names:  # the head
        return {"num_warps": HEAD_WARPS, "maxnreg": HEAD_REGISTERS}
    return {}


def _operator(kernel: Any, writes: str) -> Callable[..., None]:
    """Register an operator mamlctl::NAME that launches a kernel and writes to the tensors `writes`."""
    names, written = argument_names(kernel), writes.split()

    def declared(name: str) -> str:
        kind = "int" if name in INTEGERS | CONSTANTS else "float" if name in REALS else "Tensor"
        if name in written:
            kind = f"Tensor(a{written.index(name)}!)"
        return f"{kind}{'?' if name in OPTIONAL else ''} {name}"

    # The first block reads its filters as rows of 9 C numbers; other images and filters are channels last.
    as_rows = {"w", "w_t", "gw"} if "cov" in names else set()

    def check(programs: int, tiles: int, *arguments: Any) -> None:
        if tiles > MOST_TILES:
            raise RuntimeError(f"{kernel.fn.__name__}: {tiles} tiles are more than {MOST_TILES}")
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, torch.Tensor) and not _is_dense(value, name not in as_rows):
                raise ValueError(f"{kernel.fn.__name__}: {name} has strides {value.stride()}")

    def launch(programs: int, tiles: int, *arguments: Any) -> None:
        check(programs, tiles, *arguments)
        values = dict(zip(names, arguments, strict=True))
        dtype = next(values[name].dtype for name in ("p", "p_t", "soft", "out", "gw") if name in values)
        kernel[(programs, tiles)](**values, **constants(kernel, values, dtype), **options(kernel))

    schema = f"(int programs, int tiles, {', '.join(map(declared, names))}) -> ()"
    operator = torch.library.custom_op(
        f"mamlctl::{kernel.fn.__name__}", launch, mutates_args=written, schema=schema
    )
    operator.register_fake(check)
    KERNELS[kernel.fn.__name__] = kernel
    return operator


def _is_dense(tensor: torch.Tensor, channels_last: bool) -> bool:
    """Whether a tensor has the layout of the kernels: no gaps, no repetitions, and this order."""
    if tensor.dim() == 4 and channels_last:
        return tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous()


KERNELS: dict[str, Any] = {}  # by the name of their operator

pool = _operator(inner.pool, "p where d seen partial tickets")
activate = _operator(inner.activate, "a")
backward_sums = _operator(inner.backward_sums, "d partial tickets")
backward_spread = _operator(inner.backward_spread, "gc")
tangent_pool = _operator(inner.tangent_pool, "p_t d partial tickets")
tangent_activate = _operator(inner.tangent_activate, "a_t")
tangent_sums = _operator(inner.tangent_sums, "d partial tickets")
tangent_spread = _operator(inner.tangent_spread, "ct")
first_forward = _operator(first.first_forward, "p where a d seen")
first_backward = _operator(first.first_backward, "d partial tickets gw")
first_tangent = _operator(first.first_tangent, "p_t a_t d")
first_tangent_backward = _operator(first.first_tangent_backward, "d partial tickets gw")
convolve = _operator(products.convolve, "out")
filter_gradient = _operator(products.filter_gradient, "gw sums tickets")
head_gradient = _operator(head.head_gradient, "logits loss score g soft ga gw gb")
head_tangent = _operator(head.head_tangent, "ga_t gw gb")

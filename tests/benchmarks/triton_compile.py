"""Compile every Triton kernel for GPUs that are not there: `python -m benchmarks.triton_compile [FILE]`.

Prints a line for each kernel, dtype, size and architecture; FILE receives all numbers as
JSON. Compiled kernels are kept in Triton's cache, so a second run takes seconds.
"""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mamlctl.engine.kernels.triton import ops
from mamlctl.engine.kernels.triton.convolutions import DEEPEST

ARCHITECTURES = (80, 90)  # A100 and H100
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_CHANNELS = (1, 3)  # of the first block
HEADS = ({"E": 20, "N": 20}, {"E": 50, "N": 5})  # examples and classes, of the largest tiles
# Convolution forward and back, with the largest tiles of both.
CONVOLUTIONS = {
    "float32": ({"BACK": 0, "BP": 128}, {"BACK": 1, "BP": 32}),
    "bfloat16": ({"BACK": 0, "BP": 64}, {"BACK": 1, "BP": 64}),
}
FIXED_TILES = {"TF32": 1, "PARTS": 8, "BO": 64}
# Tensors in the dtype of the products, and those in float64, uint8 and int32; all others are float32.
STORED = {"c", "p", "a", "ga", "ga_t", "gc", "ct", "p_t", "a_t"}
OF_CONVOLUTIONS = {"x", "w", "x2", "w2", "out", "g", "g2"}  # in the dtype of the products there
FIXED = {"d": "fp64", "mean_q": "fp64", "cov": "fp64", "where": "u8", "tickets": "i32"}
FIXED |= {"y": "i64"}


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel uses; spills are the bytes of registers that it stores in memory."""

    kernel: str
    dtype: str
    # Channels of the image for the first block, a number in HEADS for the head or in CONVOLUTIONS.
    size: int | None
    architecture: int
    registers: int
    spills: int
    shared: int  # bytes of shared memory


def variants() -> Iterator[tuple[str, str, int | None, int]]:
    """Yield every kernel with its dtype, size and architecture."""
    for name, kernel in ops.KERNELS.items():
        names = ops.argument_names(kernel)
        sizes: Sequence[int | None] = (None,)
        if "BACK" in names:
            sizes = range(2)
        elif "C" in names or "HEAD" in name.upper():
            sizes = IMAGE_CHANNELS if "C" in names else range(len(HEADS))
        for dtype, each, architecture in itertools.product(DTYPES, sizes, ARCHITECTURES):
            yield name, dtype, each, architecture


def compiled(name: str, dtype: str, size: int | None, architecture: int) -> Compiled:
    """Compile one kernel, with the optional tensors present.

    Args:
        name: of the kernel.
        dtype: of the products.
        size: as in `Compiled`.
        architecture: the compute capability times ten.
    """
    kernel = ops.KERNELS[name]
    constants: dict[str, Any] = {"C": size, "GIVEN": 0}
    present = dict.fromkeys(ops.argument_names(kernel), 1)
    if "C" in present:
        present["C"] = size
    if "BP" in present:
        deepest = DEEPEST // DTYPES[dtype].itemsize
        constants |= FIXED_TILES | {"BP": deepest, "BI": deepest} | CONVOLUTIONS[dtype][size or 0]
        if "BACK" not in present:  # the gradient of the filters
            constants |= {"BP": deepest, "BI": 32}
    elif "N" in present:
        present |= HEADS[size or 0]
    constants |= ops.constants(kernel, present, DTYPES[dtype])
    parameters = list(inspect.signature(kernel.fn).parameters)
    stored = STORED | (OF_CONVOLUTIONS if "BP" in parameters else set())
    types = {key: "constexpr" if key in constants else _type(key, dtype, stored) for key in parameters}
    # As at run time: tensors begin at multiples of 16 bytes, and K and N are multiples of 16 with 64 filters.
    aligned = [key for key in parameters if types[key].startswith("*") or key in {"K", "N"}]
    source = ASTSource(
        kernel,
        types,
        {(parameters.index(key),): value for key, value in constants.items() if key in parameters},
        {(parameters.index(key),): [["tt.divisibility", 16]] for key in aligned if "BP" in parameters},
    )
    target = GPUTarget("cuda", architecture, 32)
    result = triton.compile(source, target=target, options=ops.options(kernel))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    use = dict(part.split(":", 1) for part in report.split() if part.startswith(("REG:", "STACK:")))
    used = int(use["REG"]), int(use["STACK"]), int(result.metadata.shared)
    return Compiled(name, dtype, size, architecture, *used)


def _type(name: str, dtype: str, stored: set[str]) -> str:
    if name in ops.INTEGERS:
        return "i32"
    if name in ops.REALS:
        return "fp32"
    of_products = "bf16" if dtype == "bfloat16" else "fp32"
    return "*" + FIXED.get(name, of_products if name in stored else "fp32")


def main() -> None:
    """Compile everything."""
    rows = []
    for variant in variants():
        rows.append(asdict(compiled(*variant)))
        sys.stdout.write(f"{' '.join(map(str, rows[-1].values()))}\n")
        sys.stdout.flush()
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(
            json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

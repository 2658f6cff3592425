"""An estimate of a meta-step's time on GPUs, from the operations of a run on fake tensors; not a measurement.

Each operation takes the time of its launch plus the longer of two times: that of its bytes at the memory's
rate, and that of its FLOPs in convolutions and matrix products. Every tensor that an operation reads or
writes counts once per operation, as if no cache kept it. Work inside library calls, for example changes of
layout, is not counted, and neither are gaps between kernels or programs that wait for others.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.cases import Case, omniglot, train_config
from benchmarks.fake_cuda import fake_cuda
from benchmarks.worker import random_episodes
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

LAUNCH_S = 1.5e-6  # of a kernel in a CUDA graph
# Bytes per second, and achieved FLOP/s by the dtype of the products; float32 stands for TF32.
MEMORY = {"A100": 1.6e12, "H100": 2.7e12}
PRODUCTS = {("A100", "tf32"): 110e12, ("H100", "tf32"): 280e12, ("H100", "bf16"): 560e12}

CASES = (omniglot(5, 1), omniglot(20, 1))
COLUMNS = ("case", "precision", "operations", "launches", "GB", "GFLOP", "A100 ms", "H100 ms")
FOOTER = (
    "Per launch 1.5 microseconds, in a CUDA graph. A100: 1.6 TB/s, 110 TFLOP/s (tf32). H100: 2.7 TB/s, 280 "
    "TFLOP/s (tf32), 560 (bf16). Second order, 8 tasks, 5 inner steps."
)
# These launch no kernel; neither do operations that only return views.
ALLOCATIONS = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"]
)


@dataclass
class Budget:
    """What a meta-step asks of a device."""

    operations: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    work: list[tuple[int, int, int]] = field(default_factory=list)  # launches, bytes, FLOPs of each operation
    copies: Counter[str] = field(default_factory=Counter)  # launches of copies and casts, by function

    def add(self, name: str, launches: int, moved: int, flops: int) -> None:
        """Add one operation."""
        self.operations[name] += 1
        self.launches[name] += launches
        self.bytes[name] += moved
        self.flops[name] += flops
        self.work.append((launches, moved, flops))

    def seconds(self, device: str, precision: str) -> float:
        """Estimate the time on a device of `MEMORY`, at a precision of `PRODUCTS`."""
        memory, products = MEMORY[device], PRODUCTS[device, precision]
        return sum(
            launches * LAUNCH_S + max(moved / memory, flops / products)
            for launches, moved, flops in self.work
        )


class Count(TorchDispatchMode):
    """Record every operation on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget()

    def __torch_dispatch__(
        self, operation: OpOverload, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        namespace, _, name = operation._schema.name.partition("::")
        declared = operation._schema.arguments
        named = {argument.name: value for argument, value in zip(declared, args, strict=False)} | kwargs
        read, made = tensors(named), tensors(result)
        on_device = any(tensor.is_cuda for tensor in (*read, *made))
        if namespace == "prim" or name in ALLOCATIONS or is_view(operation) or not on_device:
            return result
        changed = [
            tensor
            for argument in declared
            if argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tensors(named.get(argument.name))
        ]
        if namespace == "mamlctl" or name in OVERWRITES:  # what these write, they do not read
            read = [tensor for tensor in read if not any(tensor is other for other in changed)]
        if name in GATHERS:  # these read only what they return
            read = [*made, *(tensor for tensor in read if not tensor.is_floating_point())]
        moved = sum(map(size, (*read, *(changed or made))))
        flops = FLOPS[name](named, made) if name in FLOPS else 0
        if name in COPIES:
            self.budget.copies[caller()] += 1
        self.budget.add(
            name, len(made) if name == "convolution_backward" else LAUNCHES.get(name, 1), moved, flops
        )
        return result


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def caller() -> str:
    """Return the function of the package that called the current operation, as FILE:FUNCTION."""
    for frame in reversed(traceback.extract_stack()):
        if "/mamlctl/" in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.rpartition('/mamlctl/')[2]}:{frame.name}"
    return ""


def is_view(operation: OpOverload) -> bool:
    """Whether an operation returns only views of its arguments."""
    returns = operation._schema.returns
    return bool(returns) and all(
        value.alias_info is not None and not value.alias_info.is_write for value in returns
    )


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; those that an expanded tensor repeats count once."""
    sizes = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


def _of_windows(places: int) -> Callable[[Mapping[str, Any], Sequence[Tensor]], int]:
    """The first block's convolution at some places of each pooling window."""
    return lambda named, made: 2 * places * named["where"].numel() * named["w"][0].numel()


def _products(named: Mapping[str, Any], made: Sequence[Tensor]) -> int:
    return 2 * made[0].numel() * named.get("batch1", named["self"]).shape[-1]


def _pairs(named: Mapping[str, Any]) -> int:
    """How many products of a convolution's kernel are added."""
    return 1 if named["x2"] is None else 2


FLOPS: dict[str, Callable[[Mapping[str, Any], Sequence[Tensor]], int]] = {
    "convolution": lambda named, made: 2 * made[0].numel() * named["weight"][0].numel(),
    "convolution_backward": lambda named, made: (
        2 * len(made) * named["grad_output"].numel() * named["weight"][0].numel()
    ),
    "bmm": _products,
    "mm": _products,
    "baddbmm": _products,
    "baddbmm_": _products,
    "convolve": lambda named, made: 18 * named["K"] * named["out"].numel() * _pairs(named),
    "filter_gradient": lambda named, made: 2 * named["M"] * named["gw"].numel() * _pairs(named),
    "first_forward": _of_windows(4),
    "first_backward": _of_windows(1),
    "first_tangent": _of_windows(1),
    "first_tangent_backward": _of_windows(1),
}
LAUNCHES = {"baddbmm": 2}  # the copy of the summand; one kernel for each gradient of a convolution
OVERWRITES = frozenset(("fill_", "zero_", "copy_"))
# Operations that only move or convert values.
COPIES = frozenset(("clone", "copy_", "_to_copy", "cat", "stack", "repeat", "constant_pad_nd"))
# Why each function of a meta-step copies or casts.
REASONS = {
    "engine/algorithms/adjoint.py:_by_name": "the optimiser needs contiguous gradients of rows and rates",
    "engine/algorithms/adjoint.py:_rates": "a rate per weight, so that an update is one operation",
    "engine/algorithms/adjoint.py:step_back": "the sums of all rates, so that their rows are updated at once",
    "engine/algorithms/meta_gradient.py:means": "losses and scores of all steps, so that one mean serves all",
    "engine/algorithms/meta_gradient.py:of": "support losses of all steps, so that one mean serves all",
    "engine/derivatives/conv4.py:of_all_tasks": "norm gradients of all blocks, so that one sum serves all",
    "engine/derivatives/conv4.py:prepare": "images of all tasks in the channels of one convolution",
    "engine/kernels/triton/block.py:prepare": "padded images and patch moments, once per set",
    "engine/nets/batch_norm.py:accumulate": "statistics of all passes, so that all running rows move at once",
    "engine/nets/flat.py:cast": "filters in bfloat16, once per inner step for all blocks and both sets",
    "engine/nets/flat.py:flattened": "slow weights of each task, once per meta-step; per-weight rates",
    "engine/nets/flat.py:of": "the buffer of the fast weights, once per meta-step",
    "engine/nets/flat.py:ordered": "gradients in one buffer, so that an update is one operation",
}
GATHERS = frozenset(("gather", "index_select", "index"))


def budget_of(case: Case, precision: str, block: str = "triton") -> Budget:
    """Run one meta-step of MAML++ on a fake device and count its operations.

    Args:
        case: the shapes and the order.
        precision: "tf32" or "bf16".
        block: "triton" or "torch".
    """
    config = train_config(case, {"engine": "adjoint", "precision": precision})
    with fake_cuda(block) as device:
        step = MetaStep(config, *build(config, case.image, device))
        episodes = random_episodes(case, device)
        with Count() as count:
            step.apply(step.measure(episodes, 0, measure_all=False), 0)
    return count.budget


def estimates() -> Table:
    """Return a table of the estimates for second order."""
    title = "Estimates of a meta-step on GPUs, from counted operations: none of these numbers is measured"
    table = Table(title=title, title_justify="left", box=None, caption=FOOTER, caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for case in CASES:
        for precision in ("tf32", "bf16"):
            found = budget_of(case, precision)
            counts = (found.operations, found.launches, found.bytes, found.flops)
            operations, launches, moved, flops = (count.total() for count in counts)
            numbers = f"{operations}", f"{launches}", f"{moved / 1e9:.2f}", f"{flops / 1e9:.0f}"
            times = (
                f"{found.seconds(device, precision) * 1e3:.2f}" if (device, precision) in PRODUCTS else "-"
                for device in MEMORY
            )
            table.add_row(case.name, precision, *numbers, *times)
    return table

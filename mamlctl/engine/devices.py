"""Choose the device and the arithmetic of a run, and describe the machine."""

from __future__ import annotations

import ctypes
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from mamlctl.core.formatting import plural
from mamlctl.core.literals import Precision
from mamlctl.core.problems import Problem
from mamlctl.settings.variables import origin

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
KEPT_BYTES = 2**30  # freed memory that a process keeps; the tensors of one pass take a tenth of it

COMPUTE = {"bf16": torch.bfloat16}  # dtype of the convolutions' products where it is not that of the weights


def tensor_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of weights and images: float64 with --precision float64, float32 otherwise."""
    return torch.float64 if precision == "float64" else torch.float32


def device_problems(name: str, precision: Precision, cuda_graph: bool | None = None) -> list[Problem]:
    """Check that this machine has the requested device and supports the requested arithmetic.

    Args:
        name: the --device setting: auto, cpu, cuda or cuda:N.
        precision: the --precision setting.
        cuda_graph: the --cuda-graph setting; None if it is not given.

    Returns:
        The problems, as pairs of fact and hint; empty if there are none.
    """
    kind, _, index = name.partition(":")
    blamed = origin("device", name)
    if kind == "mps":
        # Losses and scores are added up in float64, and the derivatives.yaml of torch 2.14 says of max_pool2d
        # that its second derivative "just raises an error" on this kind of device.
        fact = "torch has no float64 and no second derivative of max pooling on Apple GPUs"
        return [(f"{blamed} {name} is not supported: {fact}", "use --device cpu, or a CUDA device")]
    if name != "auto" and (
        kind not in {"cpu", "cuda"} or (index and not index.isdigit()) or name.startswith("cpu:")
    ):
        where = f" in {blamed}" if blamed != "--device" else ""
        return [(f"unknown device '{name}'{where}", "use auto, cpu, cuda or cuda:N")]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= devices:
        fact = f"{blamed} is {name}, but the number of CUDA devices on this machine is {devices}"
        return [(fact, "use --device cpu or auto")]
    problems = []
    if kind == "cpu" or not devices:
        if precision == "tf32":
            problems.append(("--precision tf32 has no effect on a CPU", "use float32 or bf16"))
        if cuda_graph is not None:
            switch = "--cuda-graph" if cuda_graph else "--no-cuda-graph"
            problems.append((f"{switch} has no effect on a CPU", "leave it out"))
    return problems


def open_device(name: str, precision: Precision) -> torch.device:
    """Return the device to compute on, and set torch's matrix arithmetic for it.

    Call `device_problems` first: this function does not check its arguments.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cuda":
        # The current device is 0, or that of this process if several share the work.
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        tf32 = precision_of(precision, device) == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    return device


def _keep_freed_memory() -> None:
    """Let the C library keep up to a gigabyte of freed memory for the next tensors."""
    # By default glibc returns large tensors to the kernel, which clears every page when it is used again: a
    # fifth of the time of an evaluation at mini-ImageNet's size.
    with suppress(OSError, AttributeError, TypeError):  # another C library; TypeError on Windows
        allocator = ctypes.CDLL(None)
        allocator.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        # Older versions refuse more than 32 MiB.
        allocator.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or allocator.mallopt(M_MMAP_THRESHOLD, 2**25)


def precision_of(precision: Precision, device: torch.device) -> Precision:
    """Replace `auto` with the default arithmetic of a device."""
    if precision != "auto":
        return precision
    return "tf32" if device.type == "cuda" else "float32"


def device_words(device: torch.device) -> str:
    """Describe the device by its product name, for messages and environment.json."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu ({platform.machine()}, {threads} {plural(threads, 'thread')})"


def cpu_line(*names: str) -> str:
    """Return the first line of /proc/cpuinfo that begins with one of these names; "" if there is none."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    return next((line for line in lines if line.startswith(names)), "")


def cpu_model() -> str:
    """Return the product name of the processor."""
    return cpu_line("model name").partition(":")[2].strip() or platform.processor()


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: torch's allocations on CUDA, the resident set size on a CPU.

    0 if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def times_slower(dtype: torch.dtype) -> float:
    """Measure how many times slower a small matrix product on the CPU is in `dtype` than in float32."""
    # A product of this size takes a fraction of a second even if it is 500 times slower. The factors are not
    # random, since the random numbers of torch are those of the run.

    def seconds(kind: torch.dtype) -> float:
        left = torch.ones(128, 128, dtype=kind)
        times = []
        for _ in range(4):  # the first product loads its kernels
            start = time.perf_counter()
            torch.mm(left, left)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(dtype) / seconds(torch.float32)


def cuda_ms(work: Callable[[], object]) -> float:
    """Run `work` twice and return the milliseconds of the second run; synchronises with the device."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))

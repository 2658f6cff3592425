"""This machine's name and its rate of matrix products: `python -m benchmarks.machine`, told over a pipe."""

from __future__ import annotations

import os
import platform
import time

import torch

from benchmarks.pipes import Answer, Document, serve
from benchmarks.worker import wait
from mamlctl.engine.devices import cpu_model, open_device

SIZES = {"cpu": 2048, "cuda": 8192}  # a GPU does not fill up with 2048
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def open_machine(opening: Document) -> tuple[Document, Answer]:
    """`device` -> what the machine is; then `precision` -> seconds and flops of one product."""
    device = open_device(opening["device"], "float32")
    size = SIZES[device.type]

    def answer(question: Document) -> Document:
        open_device(opening["device"], question["precision"])  # tf32 is a switch of the whole process
        left, right = torch.rand(2, size, size, device=device).to(DTYPES[question["precision"]])
        torch.mm(left, right)  # the first call of a type prepares its kernels
        wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        wait(device)
        return {"seconds": time.perf_counter() - start, "flops": 2 * size**3}

    return facts(device, size), answer


def facts(device: torch.device, size: int) -> Document:
    """For the head of the tables and for JSON."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "matrix_size": size,
    }


if __name__ == "__main__":
    serve(open_machine)

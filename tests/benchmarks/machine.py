"""The machine's description and its speed of matrix products; a worker: `python -m benchmarks.machine`."""

from __future__ import annotations

import os
import platform
import time

import torch

from benchmarks.pipes import Answer, Document, serve
from benchmarks.worker import wait
from mamlctl.engine.devices import cpu_model, open_device

SIZES = {"cpu": 2048, "cuda": 8192}  # 2048 is too small to keep a GPU busy
PROBE_SIZE = 256  # a product in a type without instructions of its own still takes under a second
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


def open_machine(opening: Document) -> tuple[Document, Answer]:
    """Return facts about the machine for `device`, and a function that times one product.

    The function takes `precision` and, if the product is not to have the size for the device, `size`.
    """
    device = open_device(opening["device"], "float32")

    def answer(question: Document) -> Document:
        size = question.get("size", SIZES[device.type])
        open_device(opening["device"], question["precision"])  # tf32 is set per process
        left, right = torch.rand(2, size, size, device=device).to(DTYPES[question["precision"]])
        torch.mm(left, right)  # the first call per type loads its kernels
        wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        wait(device)
        return {"seconds": time.perf_counter() - start, "flops": 2 * size**3}

    return facts(device), answer


def facts(device: torch.device) -> Document:
    """Return what the tables' heading and the JSON document say about the machine."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "matrix_size": SIZES[device.type],
    }


if __name__ == "__main__":
    serve(open_machine)

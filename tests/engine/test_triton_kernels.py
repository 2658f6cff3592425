"""Triton's kernels of shapes and settings that the other tests do not reach; on a CPU in its interpreter."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if find_spec("triton") is None:
    pytest.skip("torch came without Triton", allow_module_level=True)

from mamlctl.engine.devices import open_device
from mamlctl.engine.kernels.block import BlockSettings, TorchTape
from mamlctl.engine.kernels.triton.block import TritonBlocks, prepare
from mamlctl.engine.kernels.triton.convolutions import convolve, filter_gradient
from mamlctl.engine.kernels.triton.ops import MOST_TILES

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normals(*sizes):
    """Random tensors in float64, channels last if they have four dimensions."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE) for size in sizes]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


@pytest.mark.parametrize(
    ("tasks", "inputs", "outputs", "examples", "height", "width"),
    [
        (1, 20, 70, 1, 4, 5),  # more outputs than a tile has, and more inputs
        (2, 3, 2, 3, 7, 7),  # programs that share the pixels
        (3, 1, 1, 1, 1, 1),
    ],
)
def test_convolutions_equal_those_of_torch(tasks, inputs, outputs, examples, height, width):
    x, x2, w, w2, g, g2 = normals(
        *2 * [(examples, tasks * inputs, height, width)],
        *2 * [(tasks * outputs, inputs, 3, 3)],
        *2 * [(examples, tasks * outputs, height, width)],
    )

    def by_torch(x, w):
        return F.conv2d(x, w, padding=1, groups=tasks)

    leaves = [tensor.clone().requires_grad_() for tensor in (x, w)]
    gx, gw = torch.autograd.grad((by_torch(*leaves) * g).sum(), leaves)
    leaves = [tensor.clone().requires_grad_() for tensor in (x2, w2)]
    gx2, gw2 = torch.autograd.grad((by_torch(*leaves) * g2).sum(), leaves)
    tickets = torch.zeros(MOST_TILES, dtype=torch.int32, device=DEVICE)
    args = tasks, tickets, torch.float64
    for result, expected in (
        (convolve(x, w, tasks), by_torch(x, w)),
        (convolve(x, w, tasks, (x2, w2)), by_torch(x, w) + by_torch(x2, w2)),
        (convolve(g, w, tasks, back=True), gx),
        (convolve(g, w, tasks, (g2, w2), back=True), gx + gx2),
        (filter_gradient(g, x, *args), gw),
        (filter_gradient(g, x, *args, (g2, x2)), gw + gw2),
    ):
        assert torch.allclose(result, expected, atol=1e-11)
    assert not tickets.any()


@pytest.mark.parametrize("given", [False, True], ids=["leading examples", "given statistics"])
@pytest.mark.parametrize("inputs", [2, 3], ids=["inner", "first"])
def test_blocks_normalise_by_other_statistics(inputs, given):
    """Those of the support set in front of the queries, and running ones."""
    tasks, filters, examples = 2, 3, 3
    x, weight, gamma, beta, mean, var = normals(
        (examples, tasks * inputs, 7, 6), (tasks * filters, inputs, 3, 3), *4 * [(tasks * filters,)]
    )
    first = inputs == 3
    common = {"groups": tasks, "compute": None, "first": first, "measured": None if given else 1}
    common |= {"statistics": (mean, var.square()) if given else None}
    planes = prepare(x, tasks, common["measured"]) if first else None
    # The first block reads its filters as rows.
    rows = weight.contiguous() if first else weight
    tape = TritonBlocks.on(DEVICE)(x, rows, gamma, beta, BlockSettings(**common, planes=planes))
    sure = TorchTape(x, weight, gamma, beta, BlockSettings(**common))
    assert torch.allclose(tape.out, sure.out, atol=1e-6)
    for one, other in zip(tape.seen, sure.seen, strict=True):
        assert given or torch.allclose(one, other, atol=1e-6)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no CUDA device")]


@pytest.mark.parametrize(
    ("precision", "most"),
    # In TF32 and bfloat16 rounding moves some selected places in pooling windows.
    [("float32", 1e-4), pytest.param("tf32", 0.1, marks=ON_GPU), pytest.param("bf16", 0.25, marks=ON_GPU)],
)
@pytest.mark.parametrize(("inputs", "filters", "side"), [(48, 48, 7), (5, 33, 3), (3, 5, 14)])
def test_every_pass_of_a_block_is_near_float64(precision, most, inputs, filters, side):
    """Images have three channels, and filters are no multiple of a tile."""
    open_device("cuda" if DEVICE.type == "cuda" else "cpu", precision)
    tasks, examples, first = 2, 2, inputs == 3
    x, x_t, weight, weight_t, gamma, beta, ga, ga_t = normals(
        *2 * [(examples, tasks * inputs, side, side)],
        *2 * [(tasks * filters, inputs, 3, 3)],
        *2 * [(tasks * filters,)],
        *2 * [(examples, tasks * filters, side // 2, side // 2)],
    )
    if first:
        weight, weight_t = weight.contiguous(), weight_t.contiguous()
    passes = []
    for dtype, make in ((torch.float64, TorchTape), (torch.float32, TritonBlocks.on(DEVICE))):
        compute = torch.bfloat16 if precision == "bf16" and dtype == torch.float32 else None
        prepared = prepare(x.to(dtype), tasks, None) if first and make is not TorchTape else None
        settings = BlockSettings(groups=tasks, compute=compute, first=first, planes=prepared)
        tape = make(x.to(dtype), weight.to(dtype), gamma.to(dtype), beta.to(dtype), settings)
        one = tape.backward(ga.to(dtype), keep=True)
        moved = tape.tangent(None if first else x_t.to(dtype), weight_t.to(dtype))
        two = tape.tangent_backward(ga_t.to(dtype))
        found = {"out": tape.out, "moved": moved, "weight": one.weight, "gamma": one.gamma_X}
        found |= {"beta": one.beta_X, "weight_t": two.weight, "gamma_t": two.gamma_X, "beta_t": two.beta_X}
        if not first:
            found |= {"x": one.x, "x_t": two.x if two.x_2 is None else two.x + two.x_2}
        passes.append(found)
    for name, expected in passes[0].items():
        error = (passes[1][name].double() - expected).norm() / expected.norm()
        assert float(error) < most, (name, float(error))

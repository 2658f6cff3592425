"""The head's derivatives, compared with torch.autograd."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from mamlctl.engine.kernels.head import TorchHead, as_map, features_of

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="torch came without Triton")
WAYS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize(("examples", "classes", "side"), [(7, 3, 2), (20, 20, 1), (2, 300, 1)])
@pytest.mark.parametrize("way", WAYS)
def test_first_and_second_derivatives_of_the_head_equal_autograd(way, examples, classes, side):
    make = TorchHead if way == "torch" else import_module("mamlctl.engine.kernels.triton.block").TritonHead
    generator = torch.Generator().manual_seed(examples)
    tasks, filters = 2, 9

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    a, a_t = (
        as_map(normal(tasks, examples, filters * side**2), torch.empty(examples, tasks * filters, side, side))
        for _ in range(2)
    )
    weight, weight_t = (normal(tasks, classes, filters * side**2) for _ in range(2))
    bias, bias_t = (normal(tasks, classes) for _ in range(2))
    y = torch.randint(classes, (tasks, examples), generator=generator)

    def loss_of(a, weight, bias):
        logits = torch.einsum("tef,tnf->ten", features_of(a, tasks), weight) + bias[:, None]
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(
            tasks, -1
        ).mean(1)

    leaves = [tensor.clone().requires_grad_() for tensor in (a, weight, bias)]
    logits, loss_T = loss_of(*leaves)
    grads = torch.autograd.grad(loss_T.sum(), leaves, create_graph=True)
    along = sum((grad * part).sum() for grad, part in zip(grads, (a_t, weight_t, bias_t), strict=True))
    seconds = torch.autograd.grad(along, leaves)

    head = make(a, weight, bias, y)
    first = head.gradient(keep=True)
    second = head.tangent(a_t, weight_t, bias_t)
    assert torch.allclose(head.logits_TEN, logits, atol=1e-11)
    assert torch.allclose(head.loss_T, loss_T, atol=1e-11)
    if head.score_T is not None:
        assert torch.allclose(head.score_T, (logits.argmax(-1) == y).double().mean(1))
    for result, expected in ((first, grads), (second, seconds)):
        assert result.ga.is_contiguous(memory_format=torch.channels_last)
        for value, known in zip((result.ga, result.weight_TNF, result.bias_TN), expected, strict=True):
            assert torch.allclose(value, known, atol=1e-11)

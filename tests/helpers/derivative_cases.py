"""The implementations of derivatives, learners to test them on, and a comparison of their results."""

import pytest
import torch

from helpers.engine_cases import build_uneven, random_episodes, small_config
from mamlctl.engine.algorithms import adjoint as adjoint_module
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest
from mamlctl.engine.derivatives.autograd import Autograd
from mamlctl.engine.derivatives.conv4 import Conv4Derivatives
from mamlctl.engine.kernels import c_block, c_library
from mamlctl.engine.kernels.winograd import Winograd
from mamlctl.engine.nets.batch_norm import accumulate

CPU = torch.device("cpu")
HAS_C = c_library.library(torch.float64) is not None
needs_c = pytest.mark.skipif(not HAS_C, reason="there is no C compiler")


WAYS = {
    "autograd": Autograd,
    "torch": Conv4Derivatives,
    "c": lambda net: Conv4Derivatives(net, c_block.native_block, c_block.prepare),
    "winograd": lambda net: Conv4Derivatives(net, c_block.native_block, c_block.prepare, Winograd),
}


BY_HAND = ["torch", *(pytest.param(way, marks=needs_c) for way in ("c", "winograd"))]


# Odd sizes lose a row or column in pooling, not in statistics.
IMAGES = [(1, 16, 16), (3, 21, 19), (2, 35, 16)]


SETTINGS = [
    {"algo": "maml++", "da": False},
    {"algo": "maml", "bnwb": True, "filters": 20, "meta_batch_size": 3},  # not a multiple of a vector
    {"algo": "maml", "lslr": True, "inner_steps": adjoint_module.KEPT + 2},  # some passes are computed again
]


def prepared(image=IMAGES[0], **settings):
    """A learner with some negative batch-norm weights, and tasks for it."""
    config = small_config(**settings)
    net, state = build_uneven(config, image=image)
    for name, tensor in state.norm.items():
        if name.endswith("weight"):
            tensor[:, 1] *= -1  # pooling before batch norm must then take the sign into account
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    return config, net, state, random_episodes(config, image=image)


def measured_by(function, config, net, state, episodes, first_order, **more):
    steps = config.inner_steps
    weights = [(step + 1) / steps**2 for step in range(steps)] if config.msl else [0.0] * (steps - 1) + [1.0]
    named = {"inner_steps": steps, "msl_weights": weights, "first_order": first_order, "measure_all": True}
    return function(net, state, episodes, MetaStepRequest(**named), **more)


def assert_equal_measurements(result, expected, state, tolerance=1e-11):
    assert list(result.query_losses) == list(expected.query_losses)
    for name in ("query_losses", "query_scores"):
        for key, value in getattr(expected, name).items():
            assert torch.allclose(getattr(result, name)[key], value, rtol=tolerance, atol=tolerance), name
    assert torch.allclose(result.support_losses_I, expected.support_losses_I, rtol=tolerance)
    assert torch.allclose(result.meta_loss, expected.meta_loss, rtol=tolerance)
    assert result.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert float(grad.abs().max()) > 0, f"the expected gradient of {name} is 0"
        error = (result.grads[name] - grad).abs().max() / grad.abs().max()
        assert float(error) < tolerance, (name, float(error))
    running = [{name: rows.clone() for name, rows in state.running.items()} for _ in range(2)]
    for into, measured in zip(running, (result, expected), strict=True):
        accumulate(into, measured.norm_passes)
    for name, rows in running[0].items():
        assert torch.allclose(rows, running[1][name], rtol=tolerance, atol=tolerance), name

"""The same numbers on a CUDA device as on the CPU."""

import pytest
import torch
from engine_cases import IMAGE, random_episodes, small_config

from mamlctl.engine.devices import memory_bytes, open_device
from mamlctl.engine.step import MetaStep, build, what_is_not_finite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on(device, config, meta_steps=2):
    """The learner after some meta-steps on a device, and its last measurement."""
    net, state = build(config, IMAGE, device)
    step = MetaStep(config, net, state)
    for number in range(meta_steps):
        episodes = random_episodes(config, seed=number)
        moved = type(episodes)(*(tensor.to(device) for tensor in vars(episodes).values()))
        measured = step.measure(moved, 0, measure_all=True)
        step.apply(measured, 0)
    return state, measured


@pytest.mark.parametrize("first_order", [False, True])
def test_cuda_gives_the_numbers_of_the_cpu(first_order):
    config = small_config(algo="maml++", da=False, first_order=first_order)
    device = open_device("cuda", "float64")
    (state, measured), (cuda_state, cuda_measured) = (on(torch.device("cpu"), config), on(device, config))
    assert what_is_not_finite(cuda_measured) is None
    for name, grad in measured.grads.items():
        assert torch.allclose(grad, cuda_measured.grads[name].cpu(), rtol=1e-7, atol=1e-10), name
    for name, tensor in state.stored().items():
        assert torch.allclose(tensor, cuda_state.stored()[name].cpu(), rtol=1e-7, atol=1e-9), name
    assert memory_bytes(device) > 0

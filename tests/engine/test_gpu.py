"""Results on a CUDA device compared with those on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.engine_cases import IMAGE, random_episodes, small_config
from helpers.module_cases import Encoder, Recurrent, conv4, module_net

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import memory_bytes, open_device
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.kernels.convolutions import GROUPED, PRODUCTS
from mamlctl.engine.kernels.triton.block import TritonBlocks
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.nets.factory import Parts
from mamlctl.engine.training.checkpoints import save
from mamlctl.engine.training.cuda_graphs import Captured
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep, first_non_finite
from mamlctl.engine.training.module_check import checked
from mamlctl.engine.training.progress import Period

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def on(device, config, meta_steps=2):
    """The state after some meta-steps on a device, and the last result."""
    net, state = build(config, IMAGE, device)
    step = MetaStep(config, net, state)
    for number in range(meta_steps):
        episodes = random_episodes(config, seed=number)
        moved = type(episodes)(*(tensor.to(device) for tensor in episodes.sets))
        measured = step.measure(moved, 0, measure_all=True)
        step.apply(measured, 0)
    return state, measured


@pytest.mark.parametrize("make", [conv4, Encoder, Recurrent])
def test_a_module_has_the_same_gradient_on_both_devices(make):
    """Also an LSTM, whose cuDNN kernels have no second derivative, and fused attention."""
    config, grads = small_config(algo="maml++", da=False, net="own.py:make"), []
    plan, _ = checked(module_net(make, IMAGE, config.ways))
    for device in (torch.device("cpu"), open_device("cuda", "float64")):
        net, state = build(config, IMAGE, device, parts=Parts(plan))
        moved = [tensor.to(device) for tensor in random_episodes(config).sets]
        grads.append(MetaStep(config, net, state).measure(Episodes(*moved), 0, measure_all=True).grads)
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name].cpu(), grad, rtol=1e-7, atol=1e-10), name


@pytest.mark.parametrize("first_order", [False, True])
def test_cuda_results_equal_cpu_results(first_order):
    # torch's fused Adam has the meta learning rate in float32, in which 0.001 is not exact.
    config = small_config(algo="maml++", da=False, first_order=first_order, meta_lr=2**-10)
    device = open_device("cuda", "float64")
    (state, measured), (cuda_state, cuda_measured) = (on(torch.device("cpu"), config), on(device, config))
    assert first_non_finite(cuda_measured) is None
    for name, grad in measured.grads.items():
        assert torch.allclose(grad, cuda_measured.grads[name].cpu(), rtol=1e-7, atol=1e-10), name
    for name, tensor in state.stored().items():
        assert torch.allclose(tensor, cuda_state.stored()[name].cpu(), rtol=1e-7, atol=1e-9), name
    assert memory_bytes(device) > 0


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    ("engine", "precision"), [("adjoint", "float64"), ("plain", "float64"), ("adjoint", "float32")]
)
def test_replayed_meta_steps_equal_eager_ones(engine, precision, first_order):
    """The schedules change on the way: MSL weights, learning rate, and which query losses are used."""
    device, near = open_device("cuda", precision), {"rtol": 1e-9, "atol": 1e-11}
    if precision == "float32":  # the kernels in Triton
        near = {"rtol": 1e-4, "atol": 1e-5}
    states, failures = [], []
    for captured in (False, True):
        config = small_config(
            algo="maml++",
            da=False,
            first_order=first_order,
            engine=engine,
            precision=precision,
            filters=16,
            msl_epochs=3,
            epochs=5,
        )
        net, state = build(config, IMAGE, device)
        step = MetaStep(config, net, state)
        runner = Captured(step, on_failure=failures.append) if captured else step
        for number in range(20):
            episodes = random_episodes(config, seed=number)
            moved = Episodes(*(placed(episodes, device, state.example_tensor.dtype)))
            measured = runner.measure(moved, number // 4, measure_all=number % 3 == 0)
            runner.apply(measured, number // 4)
        states.append(state.stored())
    assert not failures
    for name, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][name], **near), name


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_meta_steps_do_not_synchronise_with_the_device():
    """There is no host synchronisation between reports, neither eager nor replayed."""
    device = open_device("cuda", "float32")
    config = small_config(algo="maml++", precision="float32")
    net, state = build(config, IMAGE, device)
    episodes = random_episodes(config)
    ready = type(episodes)(
        *(t.to(device, torch.float32 if t.is_floating_point() else t.dtype) for t in episodes.sets)
    )
    runner, period = Captured(MetaStep(config, net, state)), Period.empty(config.inner_steps, device)
    for number in range(6):
        # The first meta-step of a kind compiles its kernels, and the second is recorded.
        torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
        try:
            measured = runner.measure(ready, 0, measure_all=False)
            runner.apply(measured, 0)
            period.add_no_sync(measured)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert first_non_finite(measured) is None


def test_both_convolution_methods_agree_on_the_device():
    generator = torch.Generator().manual_seed(0)
    x, weight, g = (
        torch.randn(size, generator=generator, dtype=torch.float64).cuda()
        for size in ((5, 6, 9, 8), (12, 2, 3, 3), (5, 12, 9, 8))
    )
    assert torch.allclose(GROUPED.forward(x, weight, 3), PRODUCTS.forward(x, weight, 3), atol=1e-10)
    for one, other in zip(*(way.backward(g, x, weight, 3, True) for way in (GROUPED, PRODUCTS)), strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_a_checkpoint_of_the_device_opens_on_the_cpu(tmp_path):
    _, state = build(small_config(), IMAGE, open_device("cuda", "float64"))
    content = {"stored": state.stored(), "epoch": 1, "val_score": 0.5, "val_ci95": 0.1}
    save(tmp_path / "best.pt", content, owner="run")
    code = "from mamlctl.engine.training.checkpoints import load; from pathlib import Path; import sys\n"
    code += "load(Path(sys.argv[1]), owner='run')"
    command = [sys.executable, "-c", code, str(tmp_path / "best.pt")]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)


def relative_error(tensor, expected):
    return float((tensor.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-3), ("tf32", 0.3), ("bf16", 0.8)])
def test_the_kernels_give_the_meta_gradient_of_float64(precision, most):
    """With one inner step, because each step amplifies the rounding."""
    settings = {"algo": "maml++", "da": False, "filters": 16, "ways": 5, "inner_steps": 1}
    _, expected = on(torch.device("cpu"), small_config(**settings), meta_steps=1)
    config = small_config(**settings, precision=precision)
    device = open_device("cuda", precision)
    net, state = build(config, IMAGE, device)
    assert isinstance(select_derivatives(net, state.example_tensor).make_block, TritonBlocks)
    moved = Episodes(*placed(random_episodes(config, seed=0), device, torch.float32))
    measured = MetaStep(config, net, state).measure(moved, 0, measure_all=True)
    for name, grad in expected.grads.items():
        assert relative_error(measured.grads[name], grad) < most, name


def placed(episodes, device, dtype):
    """The sets of some tasks on a device, images in another dtype."""
    return [part.to(device, dtype if part.is_floating_point() else part.dtype) for part in episodes.sets]


@pytest.mark.parametrize("statistics", list(Statistics))
def test_predictions_on_the_device_are_those_of_the_cpu(statistics):
    """In the first inner step all tasks share one set of weights, as an expanded tensor."""
    outputs = []
    for device, precision in ((torch.device("cpu"), "float64"), (open_device("cuda", "float32"), "float32")):
        config = small_config(algo="maml++", filters=16, ways=5, precision=precision)
        net, state = build(config, IMAGE, device)
        episodes = random_episodes(config)
        moved = episodes if precision == "float64" else Episodes(*placed(episodes, device, torch.float32))
        derivatives = select_derivatives(net, state.example_tensor)
        request = PredictRequest(TaskSets(derivatives, moved), state.frozen(), 3, statistics)
        outputs.append(adapted(request))
    assert relative_error(outputs[1], outputs[0]) < 1e-3

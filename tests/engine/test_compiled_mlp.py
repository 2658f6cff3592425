"""The meta-gradient of curves in C, compared with double backward, and its Adam with torch's."""

import itertools

import pytest
import torch
from helpers.algorithm_cases import CPU
from helpers.data_cases import stream_settings
from helpers.derivative_cases import assert_equal_measurements, needs_c
from helpers.engine_cases import SMALL, build_uneven, small_config
from helpers.trainer_cases import comparable, make_run

from mamlctl.core.errors import DivergedError, SettingsError
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.engine.algorithms import compiled_mlp
from mamlctl.engine.algorithms.compiled_mlp import CompiledAdam, compiled
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.derivatives import selection
from mamlctl.engine.derivatives.selection import slower_than_it_could_be
from mamlctl.engine.optimizers import Adam
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.settings import resolve_settings

pytestmark = needs_c

LEARNERS = {
    "maml": {},
    "boil": {"adapts": "body"},
    "anil's layers": {"adapts": "head"},
    "lslr": {"lslr": True},
    "meta-sgd": {"algo": "meta-sgd"},
    "alpha-maml": {"algo": "alpha-maml"},
}
# Widths that are no multiples of a vector, and one that is; one, few and many examples.
NETS = [
    {"hidden": "40-40", "shots": 5, "inner_steps": 1},
    {"hidden": "17-9-6", "activation": "leaky_relu", "shots": 7, "inner_steps": 4},
    {"hidden": "3", "shots": 1, "inner_steps": 3},
]


def curves(dtype=torch.float64, shots=5, queries=11):
    settings = stream_settings(split="train", shots=shots, queries=queries, dtype=dtype)
    return CurveStream(FAMILIES["sinusoid"], settings)


def learner(tasks=6, **settings):
    """A learner on curves whose inner rates all differ, and its tasks."""
    config = small_config(
        **{"net": "mlp", "ways": 1, "inner_lr": 0.02, "engine": "compiled", "meta_batch_size": tasks}
        | settings
    )
    net, state = build_uneven(config, image=(1,))
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    dtype = state.example_tensor.dtype
    return config, net, state, curves(dtype, config.shots).episodes(0, tasks)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("net", NETS, ids=lambda net: net["hidden"])
@pytest.mark.parametrize("name", LEARNERS)
def test_meta_gradients_equal_double_backward(name, net, first_order):
    config, net, state, episodes = learner(**LEARNERS[name] | net)
    steps = config.inner_steps
    multi_step = tuple((step + 1) / steps**2 for step in range(steps))
    for weights, measure_all in itertools.product((multi_step, (0.0,) * (steps - 1) + (1.0,)), (False, True)):
        request = MetaStepRequest(steps, weights, first_order, measure_all)
        result, expected = (part(net, state, episodes, request) for part in (compiled, unrolled))
        assert_equal_measurements(result, expected, state)


def test_float32_is_as_precise_as_autograd():
    errors = {}
    exact = learner(hidden="40-40", inner_steps=2, precision="float64")
    request = MetaStepRequest(2, (0.0, 1.0), False, False)
    truth = unrolled(*exact[1:], request).grads
    single = learner(hidden="40-40", inner_steps=2, precision="float32")
    for function in (compiled, unrolled):
        grads = function(*single[1:], request).grads
        errors[function] = max(
            float((grads[name].double() - grad).abs().max() / grad.abs().max())
            for name, grad in truth.items()
        )
    assert errors[compiled] < max(3 * errors[unrolled], 1e-5)


def test_results_do_not_depend_on_threads_or_on_earlier_calls(monkeypatch):
    monkeypatch.setattr(compiled_mlp, "WORK_OF_THREAD", 1)
    _, net, state, episodes = learner(tasks=7, lslr=True, precision="float32", inner_steps=3)
    request = MetaStepRequest(3, (0.2, 0.3, 0.5), False, True)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(compiled(net, state, episodes, request))
        compiled(net, state, curves(torch.float32, 3).episodes(50, 7), request)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.meta_loss, results[0].meta_loss)
        assert all(torch.equal(other.grads[name], grad) for name, grad in results[0].grads.items())


@pytest.mark.parametrize("task_chunk", ["1", "4"])
def test_chunks_of_tasks_have_the_same_meta_gradient(task_chunk):
    grads = []
    for chunk in ("auto", task_chunk):
        config, net, state, episodes = learner(task_chunk=chunk)
        grads.append(MetaStep(config, net, state).measure(episodes, 0, measure_all=True).grads)
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, rtol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_adam_in_c_equals_that_of_torch(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(7, 9, generator=generator), "b": torch.randn(3, generator=generator)}
    moved = []
    for kind in (Adam, CompiledAdam):
        tensors = {name: value.to(dtype, copy=True) for name, value in start.items()}
        optimizer = kind(tensors, 0.01, (0.9, 0.99))
        for step in range(20):
            optimizer.set_lr(0.01 / (step + 1))
            optimizer.step({name: (value * (step - 3)).sin() for name, value in tensors.items()})
        for part, of in optimizer.stored().items():
            tensors |= {f"{part}.{name}": value for name, value in of.items()}
        moved.append(tensors)
    assert moved[0].keys() == moved[1].keys()
    for name, value in moved[0].items():
        assert torch.allclose(moved[1][name], value, rtol=tolerance, atol=tolerance), name


def test_without_a_compiler_torch_computes_the_same(monkeypatch):
    config, net, state, episodes = learner()
    by_c = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    assert slower_than_it_could_be(net, state.example_tensor, "compiled") is None
    monkeypatch.setattr(compiled_mlp, "library", lambda dtype: None)
    monkeypatch.setattr(selection.c_library, "library", lambda dtype: None)
    step = MetaStep(config, net, state)
    assert type(step.optimizer) is Adam
    assert_equal_measurements(by_c, step.measure(episodes, 0, measure_all=True), state)
    assert "no working C compiler" in slower_than_it_could_be(net, state.example_tensor, "compiled")


SMALL_RUN = {"algo": "maml", "net": "mlp", "ways": 1, "hidden": "8-8", "inner_lr": 0.01, "engine": "compiled"}
SMALL_RUN |= {"epochs": 2, "steps_per_epoch": 9, "report_every": 4, "val_tasks": 6, "precision": "float32"}


def trainer_on_curves(run, *, stop_at=None, events=None):
    """A trainer; `stop_at` is the call of `stop_reason`, counted from 0, that returns a reason to stop."""
    net, state = build(run.config, (1,), CPU)
    streams = {}
    for split in ("train", "val"):
        settings = stream_settings(split=split, shots=run.config.shots, queries=run.config.queries)
        streams[split] = CurveStream(FAMILIES["sinusoid"], settings)
    questions = itertools.count()

    def stop_reason():
        return "asked" if stop_at is not None and next(questions) >= stop_at else ""

    kept = events if events is not None else []
    return Trainer(run.config, net, state, streams, run, on_event=kept.append, stop_reason=stop_reason)


@pytest.mark.parametrize(
    "more", [{}, {"algo": "alpha-maml"}, {"lslr": True, "msl": True}, {"meta_lr_final": 0.0}]
)
def test_a_run_resumes_bit_for_bit_wherever_it_stopped(tmp_path, more):
    config = small_config(**SMALL_RUN | more)
    whole = make_run(tmp_path / "whole", config)
    assert trainer_on_curves(whole).train() == ""
    for stop_at in range(1, 22, 3):
        run = make_run(tmp_path / str(stop_at), config)
        if trainer_on_curves(run, stop_at=stop_at).train():
            trainer = trainer_on_curves(run)
            trainer.resume()
            assert trainer.train() == ""
        assert comparable(run) == comparable(whole)


@pytest.mark.parametrize("more", [{}, {"lslr": True, "msl": True}, {"meta_lr_final": 0.0}])
def test_many_meta_steps_in_one_call_equal_one_after_another(tmp_path, monkeypatch, more):
    config = small_config(**SMALL_RUN | more)
    at_once = make_run(tmp_path / "many", config)
    trainer = trainer_on_curves(at_once)
    assert trainer.train() == "" and trainer._at_once > 2
    monkeypatch.setattr(MetaStep, "takes_many", False)
    alone = make_run(tmp_path / "one", config)
    assert trainer_on_curves(alone).train() == ""
    assert comparable(at_once) == comparable(alone)


class BrokenStream(CurveStream):
    """The first task of meta-step 7, counted from 1, has a value that is not finite."""

    def _draw(self, first, tasks):
        x_TE, y_TE = super()._draw(first, tasks)
        broken = 6 * SMALL["meta_batch_size"] - first
        if 0 <= broken < tasks:
            y_TE[broken] = float("nan")
        return x_TE, y_TE


def test_a_meta_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch):
    """The weights at the error are those after the last good meta-step, as without `take_many`."""
    stored = []
    for many in (True, False):
        run = make_run(tmp_path / str(many), small_config(**SMALL_RUN))
        trainer = trainer_on_curves(run)
        settings = stream_settings(split="train", shots=run.config.shots, queries=run.config.queries)
        trainer.streams["train"] = BrokenStream(FAMILIES["sinusoid"], settings)
        if not many:
            monkeypatch.setattr(MetaStep, "takes_many", False)
        with pytest.raises(DivergedError) as caught:
            trainer.train()
        assert (caught.value.step, trainer.position.step) == (7, 6)
        stored.append(trainer.state.stored())
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name])


@pytest.mark.parametrize("stop_at", range(6))
def test_a_stop_beside_a_meta_step_that_is_not_finite_names_the_right_step(tmp_path, stop_at):
    run = make_run(tmp_path / "run", small_config(**SMALL_RUN))
    trainer = trainer_on_curves(run, stop_at=stop_at)
    settings = stream_settings(split="train", shots=run.config.shots, queries=run.config.queries)
    trainer.streams["train"] = BrokenStream(FAMILIES["sinusoid"], settings)
    try:
        assert trainer.train() == "asked" and trainer.position.step < 6
    except DivergedError as error:
        assert error.step == 7


def test_a_small_rest_before_a_report_does_not_make_later_calls_small(tmp_path, monkeypatch):
    config = small_config(**SMALL_RUN | {"epochs": 1, "steps_per_epoch": 60, "report_every": 20})
    trainer = trainer_on_curves(make_run(tmp_path / "run", config))
    counts = []
    take_many = MetaStep.take_many

    def counted(self, episodes, epoch, done):
        counts.append(len(done))
        return take_many(self, episodes, epoch, done)

    monkeypatch.setattr(MetaStep, "take_many", counted)
    monkeypatch.setattr("mamlctl.engine.training.trainer.LONGEST_S", 1e9)
    assert trainer.train() == ""
    assert counts == [2, 4, 8, 4, 16, 3, 19]


@pytest.mark.parametrize(
    ("layers", "engine"),
    [
        ([("flag", {"dataset": "sinusoid"})], "compiled"),
        ([("flag", {"dataset": "line", "algo": "meta-sgd"})], "compiled"),
        ([("flag", {"dataset": "sinusoid", "algo": "anil"})], "adjoint"),
        ([("flag", {"dataset": "sinusoid", "engine": "plain"})], "plain"),
        ([("file", {"dataset": "sinusoid", "engine": "compiled"}), ("flag", {"algo": "reptile"})], "adjoint"),
        (
            [("file", {"dataset": "sinusoid", "engine": "compiled"}), ("flag", {"dataset": "glyphs"})],
            "adjoint",
        ),
    ],
)
def test_curves_are_compiled_by_default_if_the_algorithm_unrolls_them(layers, engine):
    assert resolve_settings(layers, checked=False).config.engine == engine


@pytest.mark.parametrize("settings", [{"dataset": "glyphs"}, {"dataset": "sinusoid", "algo": "anil"}])
def test_the_compiled_engine_is_refused_where_it_has_no_effect(settings):
    with pytest.raises(SettingsError, match="--engine compiled"):
        resolve_settings([("flag", settings | {"engine": "compiled"})])

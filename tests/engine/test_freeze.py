"""Frozen tensors stay bitwise equal, and all others move as they would without --freeze."""

import pytest
import torch
from helpers.algorithm_cases import CPU
from helpers.data_cases import stream_settings
from helpers.engine_cases import IMAGE, random_episodes, small_config
from helpers.module_cases import conv4

from mamlctl.core.errors import SettingsError
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.engine.algorithms.rules import algorithm_problems
from mamlctl.engine.nets.factory import Parts
from mamlctl.engine.nets.module_net import ModulePlan
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

CURVES = {"net": "mlp", "ways": 1, "inner_lr": 0.02, "hidden": "8-8"}
# Every meta-gradient, each with some tensors frozen.
CASES = {
    "adjoint": (
        {"algo": "maml++", "msl": True, "bnwb": True, "bnrs": True, "lslr": True},
        "conv?,norm2,linear.bias",
    ),
    "adjoint, all but one": ({"algo": "maml", "first_order": True}, "conv?.*,norm[1-3],norm4.bias,head"),
    "plain": ({"algo": "maml", "engine": "plain"}, "body"),
    "plain, first order": ({"algo": "fomaml", "engine": "plain"}, "head"),
    "body-epochs": ({"algo": "maml", "body_epochs": 1}, "conv1.weight,norm*"),
    "anil": ({"algo": "anil"}, "body"),
    "anil, a part of the body": ({"algo": "anil", "lslr": True}, "conv2.weight,norm1"),
    "anil, the head": ({"algo": "anil"}, "head"),
    "boil": ({"algo": "boil"}, "head"),
    "unicorn-maml": ({"algo": "unicorn-maml"}, "linear.weight"),
    "unicorn-maml, plain": ({"algo": "unicorn-maml", "engine": "plain"}, "linear.weight,conv1"),
    "maml-zero": ({"algo": "maml-zero"}, "conv1"),
    "meta-sgd": ({"algo": "meta-sgd"}, "body"),
    "alpha-maml": ({"algo": "alpha-maml"}, "conv4.weight,head"),
    "imaml": ({"algo": "imaml", "inner_steps": 2}, "conv1,norm3,linear.bias"),
    "protonet": ({"algo": "protonet"}, "conv1,norm1"),
    "transfer": ({"algo": "transfer"}, "body"),
    "nearest": ({"algo": "nearest"}, "conv1,norm4"),
    "reptile": ({"algo": "reptile", "inner_steps": 2}, "conv2,norm1,linear.weight"),
    "compiled": (CURVES | {"engine": "compiled"}, "hidden1,linear.bias"),
    "compiled, meta-sgd": (CURVES | {"algo": "meta-sgd", "engine": "compiled"}, "body"),
    "curves, plain": (CURVES | {"engine": "plain"}, "hidden?.bias"),
    "a module": ({"algo": "maml", "net": "net.py:make"}, "conv1,norm2.*,norm1.running_mean"),
}


def learner(config):
    parts = Parts(ModulePlan(conv4) if ":" in config.net else None)
    image = (1,) if config.net == "mlp" else IMAGE
    net, state = build(config, image, CPU, classes=7, parts=parts)
    return net, state


def curves():
    settings = stream_settings(split="train", shots=5, queries=6, dtype=torch.float64)
    return CurveStream(FAMILIES["sinusoid"], settings)


def tasks_of(config):
    if config.net == "mlp":
        return curves().episodes(0, config.meta_batch_size)
    episodes = random_episodes(config)
    if config.algo in ("transfer", "nearest"):
        class_TN = torch.arange(config.ways).expand(config.meta_batch_size, config.ways)
        return type(episodes)(**episodes.present() | {"class_TN": class_TN})
    return episodes


def after_a_step(config):
    """All tensors before and after the first meta-step, and the names of the frozen ones."""
    net, state = learner(config)
    before = {name: tensor.clone() for name, tensor in state.stored().items()}
    step = MetaStep(config, net, state)
    measured = step.measure(tasks_of(config), 0, measure_all=True)
    assert measured.grads.keys() == step.learnable.keys() or not state.frozen_names
    step.apply(measured, 0)
    return before, {name: tensor.clone() for name, tensor in state.stored().items()}, state.frozen_names


@pytest.mark.parametrize("name", CASES)
def test_frozen_tensors_stay_and_the_others_move_as_without(name):
    settings, freeze = CASES[name]
    before, after, frozen = after_a_step(small_config(**settings, freeze=freeze))
    _, free, none = after_a_step(small_config(**settings))
    assert frozen and not none
    moved = 0
    for tensor, value in after.items():
        if tensor in frozen:
            assert torch.equal(value, before[tensor]), tensor
        else:
            assert torch.equal(value, free[tensor]), tensor
            moved += not torch.equal(value, before[tensor])
    assert moved
    assert any(not torch.equal(free[tensor], before[tensor]) for tensor in frozen)


def test_many_compiled_steps_in_one_call_leave_frozen_tensors_too():
    config = small_config(**CURVES, engine="compiled", freeze="hidden1,linear.bias")
    tensors = []
    for at_once in (False, True):
        net, state = learner(config)
        stream = curves()
        start = {name: tensor.clone() for name, tensor in state.stored().items()}
        step, size = MetaStep(config, net, state), config.meta_batch_size
        step.apply(step.measure(stream.episodes(0, size), 0, measure_all=True), 0)
        if at_once and step.takes_many:
            results = step.take_many(stream.episodes(size, 3 * size), 0, [0.0] * 3)
            assert len(results) == 3
        else:
            for number in (1, 2, 3):
                step.apply(step.measure(stream.episodes(number * size, size), 0, measure_all=False), 0)
        for name in state.frozen_names:
            assert torch.equal(state.stored()[name], start[name]), name
        tensors.append(state.stored())
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": "conv9"}, "--freeze: 'conv9' matches no tensor of the network"),
        ({"freeze": "body,"}, "--freeze: '' matches no tensor"),
        ({"freeze": "conv1,fc"}, "--freeze: 'fc' matches no tensor"),
        ({"freeze": "*"}, "--freeze * leaves no tensor of the network to train"),
        ({"freeze": "body", "algo": "protonet"}, "leaves no tensor of the network to train"),
        ({"freeze": "head", "algo": "protonet"}, "--freeze: 'head' matches no tensor"),
        ({"freeze": "body", "algo": "maml-zero"}, "leaves no tensor of the network to train"),
        ({"freeze": "body", "body_epochs": 1}, "leaves no tensor of the network to train in --body-epochs"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(settings, words):
    with pytest.raises(SettingsError) as refused:
        learner(small_config(**{"algo": "maml"} | settings))
    ((fact, hint),) = refused.value.problems
    assert words in fact and hint


def test_the_refusal_names_the_tensors():
    with pytest.raises(SettingsError) as refused:
        learner(small_config(freeze="backbone.*"))
    ((_, hint),) = refused.value.problems
    assert "use head, body, or patterns of conv1.weight, conv2.weight" in hint and "more" in hint


def test_scratch_has_nothing_to_freeze():
    ((fact, _),) = algorithm_problems(small_config(algo="scratch", freeze="body"))
    assert fact == "--freeze has no effect with --algo scratch: nothing is trained"

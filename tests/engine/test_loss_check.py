"""Losses that cannot work are refused before training, with the place of the function."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import loss_cases
from helpers.loss_cases import own
from helpers.own_code import Once
from torch import nn

from mamlctl.core.errors import SettingsError
from mamlctl.engine.nets.loss_check import check_loss

LIKE = torch.empty((), dtype=torch.float32)


def check(function, outputs=(3,), has_classes=True, second_order=True, like=LIKE):
    check_loss(own(function), outputs, like, has_classes=has_classes, second_order=second_order)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "margin", "linear"])
@pytest.mark.parametrize("outputs", [(2,), (5, 300)])
def test_losses_of_classes_pass(name, outputs):
    check(getattr(loss_cases, name), outputs)


def test_losses_of_values_pass():
    for outputs in ((1,), (4,)):
        check(loss_cases.weighted, outputs, has_classes=False)
        check(lambda outputs, targets: (outputs - targets).abs().mean(1), outputs, has_classes=False)


def test_a_module_is_a_function_too():
    loss = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    loss.__name__ = "smooth"
    check(loss)


def test_an_int_as_a_constant_and_other_dtypes_are_converted():
    double = torch.tensor(2.0, dtype=torch.float64)

    def scaled(outputs, targets):
        return double.expand(len(targets)) * F.cross_entropy(outputs, targets, reduction="none")

    check(scaled)
    outputs, targets = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
    assert own(scaled)(outputs, targets).dtype == torch.float32


def mean(outputs, targets):
    return F.cross_entropy(outputs, targets)


def of_each_output(outputs, targets):
    return outputs.square()


def a_number(outputs, targets):
    return 1.5


def not_finite(outputs, targets):
    return outputs.sum(1).log()


def no_gradient(outputs, targets):
    return (outputs.argmax(1) != targets).double()


def by_numpy(outputs, targets):
    return torch.from_numpy(outputs.detach().numpy().sum(1))


def constant(outputs, targets):
    return 0 * outputs.sum(1)


def drawn(outputs, targets):
    return outputs.square().sum(1) * torch.rand(())


CALLS = []


def counted(outputs, targets):
    CALLS.append(1)
    return outputs.square().sum(1) * len(CALLS)


def normalised(outputs, targets):
    return (outputs - outputs.mean(0)).square().sum(1)


def by_the_number(outputs, targets):
    return outputs.square().sum(1) / len(outputs)


def by_rank(outputs, targets):
    """Other examples change the order only."""
    return outputs.square().sum(1).sort().values


def in_place(outputs, targets):
    outputs -= 1
    return outputs.square().sum(1)


def changed_targets(outputs, targets):
    targets += 1
    return outputs.square().sum(1)


def not_twice(outputs, targets):
    return Once.apply(outputs).sum(1)


def infinite_curvature(outputs, targets):
    return (outputs.square() + (outputs - outputs.detach()) ** 1.5).sum(1)


def steep(outputs, targets):
    return (outputs - outputs.detach()).sqrt().sum(1)


def failing(outputs, targets):
    return [][0]


def nothing(outputs, targets):
    outputs.square()


def complex_numbers(outputs, targets):
    return outputs.square().sum(1).to(torch.complex128)


REFUSED = {
    nothing: "returns None, not a tensor",
    complex_numbers: "returns complex numbers",
    mean: r"returns the shape \(\) for 6 examples, not \(6,\)",
    of_each_output: r"returns the shape \(6, 3\) for 6 examples",
    a_number: "returns a float, not a tensor",
    not_finite: "not finite",
    no_gradient: "without a gradient",
    by_numpy: "without a gradient",
    constant: "do not depend on the outputs",
    drawn: "other losses when it is called again",
    counted: "other losses when it is called again",
    normalised: "if other examples are given with it",
    by_the_number: "if other examples are given with it",
    by_rank: "if other examples are given with it",
    in_place: "changes its arguments",
    changed_targets: "changes its arguments",
    not_twice: "has no second derivative",
    infinite_curvature: "has a second derivative that is not finite",
    steep: "has a first derivative that is not finite",
    failing: "IndexError: list index out of range",
}


@pytest.mark.parametrize("function", list(REFUSED), ids=lambda function: function.__name__)
def test_losses_that_cannot_work_are_refused(function):
    with pytest.raises(SettingsError) as raised:
        check(function)
    assert re.search(REFUSED[function], raised.value.message)
    line = function.__code__.co_firstlineno
    assert re.search(rf"{__file__}, line {line}, in {function.__name__}: ", raised.value.message) or (
        function is failing and f"line {line + 1}, in failing: " in raised.value.message
    )
    assert raised.value.hint


def test_second_derivatives_are_needed_for_the_second_order_only():
    check(not_twice, second_order=False)
    check(infinite_curvature, second_order=False)


def test_classes_are_refused_and_every_number_of_outputs_is_tried():
    with pytest.raises(SettingsError, match="is a class, not a function"):
        check(nn.CrossEntropyLoss)
    weights = torch.ones(3, dtype=torch.float64)

    def of_three_classes(outputs, targets):
        return F.cross_entropy(outputs.double(), targets, weights, reduction="none")

    check(of_three_classes)
    with pytest.raises(SettingsError, match="in of_three_classes: RuntimeError: weight tensor"):
        check(of_three_classes, (3, 8))


def test_the_dtype_of_the_run_is_tried_too():
    def only_double(outputs, targets):
        if outputs.dtype != torch.float64:
            raise TypeError("float64 only")
        return outputs.square().sum(1)

    check(only_double, like=LIKE.double())
    with pytest.raises(SettingsError, match="TypeError: float64 only"):
        check(only_double)

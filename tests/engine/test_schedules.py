"""Schedules compared with the values of the published code."""

from dataclasses import replace

import pytest
from helpers.engine_cases import small_config

from mamlctl.engine.training.schedules import cosine_meta_lr, first_order_at, msl_weights

PINS = [
    (10, 0, [0.2] * 5),
    (10, 1, [0.18] * 4 + [0.28]),
    (10, 5, [0.10] * 4 + [0.60]),
    (10, 9, [0.02] * 4 + [0.92]),
    (10, 10, [0.0] * 4 + [1.0]),
    (15, 1, [0.18667] * 4 + [0.25333]),
    (15, 5, [0.13333] * 4 + [0.46667]),
    (15, 14, [0.01333] * 4 + [0.94667]),
    (15, 15, [0.0] * 4 + [1.0]),
]


@pytest.mark.parametrize(("msl_epochs", "epoch", "weights"), PINS)
def test_msl_weights_equal_the_published_code(msl_epochs, epoch, weights):
    assert msl_weights(5, epoch, msl_epochs) == pytest.approx(weights, abs=5e-6)


@pytest.mark.parametrize("inner_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("msl_epochs", [0, 1, 10, 34, 200])
def test_msl_weights_sum_to_one_and_move_to_the_last_step(inner_steps, msl_epochs):
    lasts = []
    for epoch in range(msl_epochs + 2):
        weights = msl_weights(inner_steps, epoch, msl_epochs)
        assert len(weights) == inner_steps
        assert sum(weights) == pytest.approx(1, abs=1e-12)
        lasts.append(weights[-1])
    assert lasts == sorted(lasts)
    assert lasts[-1] == 1


def test_msl_floor_has_an_effect_only_in_long_schedules():
    assert min(msl_weights(5, 32, 33)) == pytest.approx(1 / (5 * 33))
    assert min(msl_weights(5, 199, 200)) == pytest.approx(0.03 / 5)


def test_derivatives_are_first_order_for_exactly_da_epochs():
    config = small_config(da=True, da_epochs=2)
    assert [first_order_at(config, epoch) for epoch in range(4)] == [True, True, False, False]
    assert not first_order_at(replace(config, da_epochs=0), 0)
    assert not first_order_at(replace(config, da=False), 0)
    assert first_order_at(replace(config, first_order=True), 3)


def test_cosine_annealing_equals_the_published_values():
    assert cosine_meta_lr(0, 100, 1e-3, 1e-5) == pytest.approx(1e-3)
    assert cosine_meta_lr(50, 100, 1e-3, 1e-5) == pytest.approx(5.05e-4)
    assert cosine_meta_lr(99, 100, 1e-3, 1e-5) == pytest.approx(1.0244e-5, rel=1e-4)

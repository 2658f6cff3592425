"""Estimates of a grid: phases against their closed forms, and the total against a sum by hand."""

from collections import Counter
from dataclasses import replace

import pytest
from helpers.grid_cases import ignore, tiny_grid

from mamlctl.experiments.grid import estimate as module
from mamlctl.experiments.grid.estimate import estimate
from mamlctl.experiments.settings import fill_defaults, resolve_settings


def test_phases_follow_the_schedules():
    """The order changes after da_epochs; until msl_epochs, queries cost time after every inner step."""
    flags = {"dataset": "glyphs", "algo": "maml++", "epochs": 30, "msl_epochs": 4, "da_epochs": 10}
    config = fill_defaults(resolve_settings([("flag", flags)]).config)
    first_msl, first, second = (False, True, True), (False, True, False), (False, False, False)
    assert module._phases(config) == Counter({first_msl: 4, first: 6, second: 20})
    later = module._phases(replace(config, body_epochs=3))
    assert later == Counter({(True, True, False): 3, first_msl: 4, first: 6, second: 17})
    plain = fill_defaults(
        resolve_settings([("flag", {"dataset": "glyphs", "algo": "fomaml", "epochs": 7})]).config
    )
    assert module._phases(plain) == Counter({first: 7})


def test_the_total_is_the_sum_of_its_parts(tmp_path, glyphs_root, monkeypatch):
    """Times are invented, so that the sum is known."""
    calls = []

    def measured(config, offline, on_event, known):
        calls.append(config.inner_steps)
        task_s = 0.01 * config.inner_steps
        return module.Cost(dict.fromkeys(module._phases(config), 0.5), task_s, 3 * task_s)

    monkeypatch.setattr(module, "_measure", measured)
    grid = tiny_grid(tmp_path / "g", glyphs_root, "inner_steps=2,3", "meta_lr=0.1,0.01", seeds=(0, 1, 2))
    result = estimate(grid, 2, offline=True, on_event=ignore)
    assert sorted(calls) == [2, 3]  # the meta learning rate does not affect the time
    assert (result.cells, result.meta_steps, result.workers) == (12, 12 * 6, 2)
    # Six validation tasks per epoch; twelve test tasks for two models, scored after every inner step.
    each = [6 * 0.5 + 2 * 6 * 0.01 * steps + 12 * 2 * 0.03 * steps for steps in (2, 2, 3, 3)]
    assert [row.train_s + row.test_s for row in result.rows] == pytest.approx(each)
    assert result.seconds == pytest.approx(3 * sum(each) / 2)
    assert [row.step_s for row in result.rows] == pytest.approx([0.5] * 4)


def test_real_meta_steps_are_measured_and_nothing_is_written(tmp_path, glyphs_root):
    grid = tiny_grid(tmp_path / "g", glyphs_root, "algo=maml,protonet", seeds=(0,))
    result = estimate(grid, 1, offline=True, on_event=ignore)
    assert all(row.step_s > 0 and row.train_s > 6 * row.step_s and row.test_s > 0 for row in result.rows)
    assert not (tmp_path / "g").exists()

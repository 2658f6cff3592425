"""Several processes that share the tasks of a run get the results of one process."""

import copy
import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.algorithm_cases import CPU
from helpers.data_cases import stream_settings
from helpers.derivative_cases import needs_c
from helpers.engine_cases import SMALL, build_uneven
from helpers.rank_cases import in_ranks
from helpers.shared import ignore
from helpers.trainer_cases import TIMES, config_of, make_run, trainer_of

from mamlctl.core.errors import DivergedError
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.data.tasks.curve_tasks import CurveStream
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.algorithms.rules import sharing_problems
from mamlctl.engine.distributed import REASONS, Ranks
from mamlctl.engine.evaluation import evaluator
from mamlctl.engine.nets.batch_norm import NormPass, accumulate, init_running, mean_passes
from mamlctl.engine.reinforcement import trpo
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.run_folder import open_run
from mamlctl.settings.schema import IMPROVEMENTS

pytestmark = pytest.mark.process

COUNTS = (2, 4)
SAME = 1e-12  # largest difference of a number, relative to the largest one of its tensor
# Tensors whose gradient is 0 in exact arithmetic. Adam divides its rounding error of 1e-17 by about 1e-8.
NOISE = {"protonet": ("norm4.bias",), "unicorn-maml": ("linear.weight", "linear.bias")}
AMPLIFIED = 1e-10  # largest absolute difference of these

# Settings per case. 5 tasks are shared unevenly, and with 3 tasks one of four ranks has none.
CASES = {
    algo: {"algo": algo}
    for algo, entry in ALGORITHMS.items()
    if not (entry.whole_batches or entry.needs_rewards)
}
CASES |= {f"maml {name}": {"algo": "maml", name: True} for name in IMPROVEMENTS}
CASES |= {
    "maml++ 3 tasks": {"algo": "maml++", "meta_batch_size": 3},
    "maml++ first order": {"algo": "maml++", "first_order": True},
    "maml++ double backward": {"algo": "maml++", "engine": "plain"},
    "maml++ clipped": {"algo": "maml++", "clip_value": 0.02, "clip_norm": 0.1},
    "maml++ one task per pass": {"algo": "maml++", "task_chunk": "1"},
    "maml++ running statistics": {"algo": "maml++", "bn": "running"},
}


def settings_of(case):
    return {"epochs": 2, "steps_per_epoch": 2, "val_tasks": 7, "meta_batch_size": 5} | CASES[case]


def result_of(trainer):
    """The tensors of the state and of the optimiser, and the position, at the end of a training."""
    trainer.train()
    return checkpoints.on_cpu(trainer._content())


def single(case, folder):
    """The result of one process, and its metrics."""
    run = make_run(folder / case.replace(" ", "-"), config_of(**settings_of(case)))
    trainer = trainer_of(run, run.config)
    return result_of(trainer), run.metrics()


def trainer_of_rank(ranks, folder, config):
    """A trainer of one rank, which does not share yet; only rank 0 has a run folder."""
    return trainer_of(None if ranks.rank else make_run(folder, config), config)


def shared(case, folder, ranks):
    trainer = trainer_of_rank(ranks, folder / case.replace(" ", "-"), config_of(**settings_of(case)))
    if ranks.rank:  # `share` must replace it
        for tensor in trainer.state.stored().values():
            tensor.detach().add_(1)
    trainer.share(ranks)
    return result_of(trainer), None if trainer.run is None else trainer.run.metrics()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda case: single(case, folder))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The results of all cases by number of ranks: of each rank, in one group of processes."""

    @functools.cache
    def results(count):
        folder = tmp_path_factory.mktemp(f"ranks-{count}")
        return in_ranks(count, lambda ranks: {case: shared(case, folder, ranks) for case in CASES}, folder)

    return results


def difference(one, two):
    """The largest difference of two nested results, relative to the largest number of each tensor."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        return max((difference(one[key], two[key]) for key in one), default=0.0)
    one, two = (torch.as_tensor(item, dtype=torch.float64) for item in (one, two))
    assert one.shape == two.shape
    return float((one - two).abs().max() / one.abs().max().clamp(min=1e-3)) if one.numel() else 0.0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("case", CASES)
def test_ranks_get_the_result_of_one_process(alone, together, case, count):
    expected, metrics = copy.deepcopy(alone(case))
    (first, metrics_of_first), *others = (results[case] for results in together(count))
    pairs = [(expected["stored"].pop(name), first["stored"][name]) for name in NOISE.get(case, ())]
    assert all(float((one - two).abs().max()) < AMPLIFIED for one, two in pairs)
    of_others = {name: first["stored"][name] for name in expected["stored"]}
    assert difference(expected, first | {"stored": of_others}) < SAME
    for other, none in others:
        assert checkpoints._digest(other) == checkpoints._digest(first), "all ranks have the same bits"
        assert none is None
    for one, two in itertools.zip_longest(metrics, metrics_of_first):
        numbers = [
            {key: value for key, value in row.items() if key not in TIMES | {"kind", "metric", "bn"}}
            for row in (one, two)
        ]
        assert numbers[0].keys() == numbers[1].keys()
        for key, value in numbers[0].items():
            if isinstance(value, float | list):
                assert difference(value, numbers[1][key]) < SAME
            elif not isinstance(value, dict):
                assert value == numbers[1][key]


@pytest.mark.parametrize(("tasks", "count"), [(8, 1), (8, 2), (5, 4), (3, 4), (1, 4), (7, 3)])
def test_each_task_has_one_rank_and_the_weights_sum_to_one(tasks, count):
    shares = [Ranks(rank, count).share(tasks) for rank in range(count)]
    taken = [range(share.first, share.first + share.tasks) for share in shares if share.weight]
    assert [task for part in taken for task in part] == [*range(tasks)]
    assert sum(share.weight for share in shares) == pytest.approx(1, abs=1e-15)
    assert all(share.tasks >= 1 and share.first + share.tasks <= tasks for share in shares)
    sizes = [len(part) for part in taken]
    assert max(sizes) - min(sizes) <= 1
    assert all(share.weight == share.tasks / tasks for share in shares if share.weight)


def test_the_means_of_passes_update_the_running_statistics_as_the_passes_do():
    generator = torch.Generator().manual_seed(0)
    like = torch.empty(0, dtype=torch.float64)
    layers = {"norm1": 3, "norm2": 2}

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def seen(tasks):
        return {
            layer: (normal(tasks, channels), normal(tasks, channels)) for layer, channels in layers.items()
        }

    # Step 4 is beyond the last row; steps have different numbers of passes.
    passes = [NormPass({}, {}, step, seen=seen(tasks=3)) for step in (0, 0, 1, 2, 4)]
    one, two = (init_running(layers, rows=3, like=like) for _ in range(2))
    accumulate(one, passes)
    accumulate(two, mean_passes(two, passes))
    assert all(torch.allclose(one[name], two[name], rtol=1e-14, atol=1e-15) for name in one)
    assert mean_passes({}, passes) == []


def curve_result(ranks, config):
    net, state = build_uneven(config, image=(1,))
    streams = {
        split: CurveStream(
            FAMILIES["sinusoid"], stream_settings(split=split, shots=5, queries=5, dtype=torch.float64)
        )
        for split in ("train", "val")
    }
    trainer = Trainer(config, net, state, streams, None, on_event=lambda event: None, stop_reason=lambda: "")
    trainer.share(ranks)
    return result_of(trainer)


@needs_c
@pytest.mark.parametrize("algo", ["maml", "alpha-maml"])
def test_compiled_curves_are_shared_too(tmp_path, algo):
    curves = {"net": "mlp", "ways": 1, "engine": "compiled", "inner_lr": 0.02, "hidden": "9-9"}
    steps = {"epochs": 2, "steps_per_epoch": 6, "report_every": 6, "val_tasks": 5}
    config = config_of(**SMALL | curves | steps | {"algo": algo, "meta_batch_size": 5})
    expected = curve_result(Ranks(), config)
    for found in in_ranks(2, lambda ranks: curve_result(ranks, config), tmp_path):
        assert difference(expected, found) < SAME


NAVIGATION = {
    "maml": {"algo": "maml"},
    "maml, a step that is too long at first": {"algo": "maml", "max_kl": 10.0, "epochs": 1},
    "maml, outer pg": {"algo": "maml", "outer": "pg"},
    "maml++": {"algo": "maml++"},
    "reptile": {"algo": "reptile"},
    "transfer": {"algo": "transfer"},
    "maml, 3 tasks": {"algo": "maml", "meta_batch_size": 3},
}


def policy_result(ranks, case):
    size = {"shots": 3, "queries": 3, "hidden": "6-5", "precision": "float64", "device": "cpu"}
    length = {"meta_batch_size": 5, "epochs": 2, "steps_per_epoch": 1, "val_tasks": 5}
    values = {"dataset": "navigation"} | size | length | NAVIGATION[case]
    config = fill_defaults(resolve_settings([("flag", values)]).config)
    place = Placement(torch.device("cpu"), torch.float64)
    streams, source = open_streams(config, ("train", "val"), place, offline=True, on_event=ignore)
    net, state = build(config, source.example_shape, place.device, targets=source.targets)
    trainer = Trainer(config, net, state, streams, None, on_event=ignore, stop_reason=lambda: "")
    start = {name: tensor.detach().clone() for name, tensor in state.stored().items()}
    trainer.share(ranks)
    result = result_of(trainer)
    assert any(not torch.equal(start[name], tensor) for name, tensor in result["stored"].items())
    return result


@pytest.mark.parametrize("count", COUNTS)
def test_policies_of_ranks_are_those_of_one_process(tmp_path, monkeypatch, count):
    # With so few trajectories the second derivative is nearly singular: rounding errors of 1e-16 change the
    # step of one process by 1e-5.
    monkeypatch.setattr(trpo, "DAMPING", 1.0)
    together = in_ranks(
        count, lambda ranks: {case: policy_result(ranks, case) for case in NAVIGATION}, tmp_path
    )
    for case in NAVIGATION:
        expected = policy_result(Ranks(), case)
        assert difference(expected, together[0][case]) < SAME, case
        assert len({checkpoints._digest(results[case]) for results in together}) == 1, case


def test_a_request_to_stop_on_any_rank_stops_all_at_the_same_step(tmp_path):
    def work(ranks):
        trainer = trainer_of_rank(ranks, tmp_path / "run", config_of(epochs=2, steps_per_epoch=5))
        asked = ranks.rank == 1
        trainer.stop_reason = lambda: "SIGTERM" if asked and trainer.position.step >= 2 else ""
        trainer.share(ranks)
        return trainer.train(), trainer.position.step, checkpoints._digest(trainer._content())

    results = in_ranks(3, work, tmp_path)
    assert len(set(results)) == 1
    assert results[0][:2] == ("SIGTERM", 3)
    run = open_run(tmp_path / "run")
    assert checkpoints.load(run.checkpoints / "last.pt", owner=run.owner)["position"]["step"] == 3


def test_a_request_to_stop_ends_the_validation_of_all_ranks(tmp_path):
    def work(ranks):
        config = config_of(epochs=2, steps_per_epoch=2, val_tasks=12)
        trainer = trainer_of_rank(ranks, tmp_path / "run", config)
        trainer.stop_reason = lambda: "SIGTERM" if ranks.rank and trainer.position.step == 2 else ""
        trainer.share(ranks)
        return trainer.train(), trainer.position.step, trainer.position.validated

    assert in_ranks(2, work, tmp_path) == [("SIGTERM", 2, 0)] * 2


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path):
    def work(ranks):
        trainer = trainer_of_rank(ranks, tmp_path / "run", config_of(epochs=1, steps_per_epoch=5))
        trainer.share(ranks)
        measure = trainer.meta_step._of_own_tasks

        def broken(episodes, request):
            measured = measure(episodes, request)
            if ranks.rank == 1 and trainer.position.step == 3:
                measured.grads["linear.bias"][0] = torch.nan
            return measured

        trainer.meta_step._of_own_tasks = broken
        with pytest.raises(DivergedError, match=r"meta-step 4: the meta-gradient of linear\.bias"):
            trainer.train()
        return trainer.position.step

    assert in_ranks(2, work, tmp_path) == [3, 3]


def scores(ranks, config, tasks, curve_tasks):
    """The scores of the validation tasks, in passes of 3 tasks."""
    trainer = trainer_of(None, config)
    plan = replace(trainer.plan, tasks=tasks, curve_tasks=curve_tasks)
    states = [trainer.state, build(config, (1, 16, 16), CPU, classes=8)[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "tasks_per_pass", lambda net, examples, device: 3)
        found = evaluator.evaluate(trainer.derivatives, states, trainer.streams["val"], plan, ranks=ranks)
    return [(part.last_T, part.curve_TI) for part in (*found.single, found.ensemble)]


@pytest.mark.parametrize(("tasks", "curve_tasks"), [(20, 0), (20, 7), (13, 13), (4, 0)])
def test_ranks_get_the_scores_of_one_process_to_the_bit(tmp_path, tasks, curve_tasks):
    config = config_of(inner_steps=2)
    expected = scores(Ranks(), config, tasks, curve_tasks)
    chunked = tasks >= 3 * 3  # else three ranks use smaller passes than one
    for found in in_ranks(3, lambda ranks: scores(ranks, config, tasks, curve_tasks), tmp_path):
        for parts in zip(expected, found, strict=True):
            for one, two in zip(*parts, strict=True):
                assert one.shape == two.shape
                assert np.array_equal(one, two) if chunked else np.allclose(one, two, atol=1e-6)


def test_predictions_that_are_not_finite_end_all_ranks(tmp_path):
    def work(ranks):
        trainer = trainer_of_rank(ranks, tmp_path / "run", config_of(epochs=1, steps_per_epoch=1))
        trainer.share(ranks)
        predict = trainer.plan.predict
        broken = ranks.rank == 1

        def nan(request):
            return predict(request) * (torch.nan if broken else 1)

        trainer.plan = replace(trainer.plan, predict=nan)
        with pytest.raises(DivergedError, match="predictions in tasks 5 to 9 are not finite"):
            trainer.train()
        return True

    assert in_ranks(2, work, tmp_path) == [True, True]


def test_algorithms_with_shared_statistics_refuse_several_processes():
    for algo, entry in ALGORITHMS.items():
        problems = sharing_problems(config_of(algo=algo), 2)
        assert bool(problems) == entry.whole_batches
        assert not sharing_problems(config_of(algo=algo), 1)
    assert (
        "one batch with shared batch-norm statistics" in sharing_problems(config_of(algo="transfer"), 2)[0][0]
    )
    assert "--body-epochs" in sharing_problems(config_of(algo="maml", body_epochs=1), 2)[0][0]


def test_every_reason_has_its_place_in_the_vote():
    assert REASONS == ("time limit", "SIGINT", "SIGTERM", "SIGHUP")

"""Peers compute the same meta-gradient, FLOPs are counted correctly, and tables show the measured numbers."""

import dataclasses
import importlib.util
import io
import json
import sys

import pytest
import torch
from benchmarks import cases, curves, scaling
from benchmarks.__main__ import main_work
from benchmarks.cases import CASES, Case, case_of, engine_problem, train_config
from benchmarks.curves import curve_config, curves_table, jax_loss, measure_curves
from benchmarks.flops import layer_flops, meta_step_flops
from benchmarks.machine import PROBE_SIZE, open_machine
from benchmarks.peers import PEERS
from benchmarks.pipes import Worker, WorkerFailed
from benchmarks.report import document, growth_table, main_table, matrix_rates, peers_table
from benchmarks.rounds import Machine, Plan, Row, measure
from benchmarks.worker import open_learner, random_episodes
from helpers import preloaded
from helpers.shared import ignore
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.distributed import Ranks
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

SMALL = Case("small", (1, 16, 16), filters=4, ways=3, shots=2, queries=2, tasks=2, inner_steps=3)
PLAIN64 = {"engine": "plain", "precision": "float64"}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", PEERS)
def test_the_meta_gradient_of_every_peer_equals_that_of_the_plain_engine(name):
    if name in ("higher", "torchopt") and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    config = train_config(SMALL, PLAIN64, algo="maml")
    assert config.msl and not (config.lslr or config.bnwb or config.bnrs)
    net, state = build(config, SMALL.image, CPU)
    peer = PEERS[name](SMALL, state.slow, cases.INNER_LR)
    episodes = random_episodes(SMALL, CPU, torch.float64)
    measured = MetaStep(config, net, state).measure(episodes, 0, measure_all=False)
    loss = peer.meta_step(episodes)
    assert float(loss) == pytest.approx(float(measured.meta_loss), abs=1e-12)
    for key, grad in peer.meta_grads().items():
        assert torch.allclose(grad, measured.grads[key], rtol=1e-8, atol=1e-12), key
    # Adam has changed the weights, and the inner loop has left nothing in them.
    assert not torch.equal(next(peer.module.parameters()), state.slow[peer.names[0]])
    peer.load(state.slow)
    assert float(peer.meta_step(episodes)) == pytest.approx(float(loss), abs=1e-12)


def test_the_meta_gradient_of_jax_on_curves_equals_that_of_the_engine():
    jax = pytest.importorskip("jax")
    config = curve_config(engine="plain")
    net, state = build(config, (1,), CPU)
    streams, _ = open_streams(config, ("train",), Placement(CPU), offline=True, on_event=ignore)
    episodes = streams["train"].episodes(0, 25)
    measured = MetaStep(config, net, state).measure(episodes, 0, measure_all=False)
    flat = [tensor.detach().numpy() for tensor in state.slow.values()]
    weights = list(zip(flat[::2], flat[1::2], strict=True))
    tasks = [tensor.numpy() for tensor in episodes.sets]
    loss, grads = jax.value_and_grad(lambda layers: jax_loss(layers, tasks, config))(weights)
    assert float(loss) == pytest.approx(float(measured.meta_loss), rel=1e-5)
    flat_grads = [grad for layer in grads for grad in layer]
    for grad, expected in zip(flat_grads, measured.grads.values(), strict=True):
        assert torch.allclose(torch.tensor(grad.tolist()), expected, rtol=1e-4, atol=1e-5)


def test_training_on_curves_is_measured_and_shown(monkeypatch):
    monkeypatch.setattr(curves, "SECONDS", 0.01)
    monkeypatch.setattr(curves, "LEARNERS", ("compiled", "plain", "unknown"))
    rows = measure_curves(1)
    assert [len(row.seconds) for row in rows] == [1, 1, 0], [row.skipped for row in rows]
    assert rows[2].skipped
    console = Console(file=io.StringIO(), width=200)
    console.print(curves_table(rows))
    text = console.file.getvalue()
    assert "unknown skipped: " in text and "compiled" in text


def test_the_ranks_are_measured_and_shown(monkeypatch):
    monkeypatch.setattr(scaling, "STEPS", 1)
    found = scaling.timed(Ranks())
    assert found["seconds"] > 0
    rows = [scaling.ScalingRow(1, [0.2, 0.3, 0.2]), scaling.ScalingRow(2, [0.1, 0.125, 0.125], [0.001] * 3)]
    table = drawn(scaling.scaling_table(rows))
    assert "1.60" in table
    assert "1.00 ms" in table


def test_the_cases_list_every_peer():
    assert tuple(PEERS) == cases.PEERS


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "shapes", [{}, {"shots": 3, "queries": 1}, {"inner_steps": 1}, {"image": (3, 20, 16)}]
)
def test_flops_equal_those_that_torch_counts(first_order, shapes):
    """Up to one pass of the first layer: in second order torch also computes the images' gradient.

    There is one task, because torch counts the weight gradient of a grouped convolution as for one group.
    """
    case = dataclasses.replace(SMALL, tasks=1, first_order=first_order, **shapes)
    config = train_config(case, PLAIN64)
    step = MetaStep(config, *build(config, case.image, CPU))
    episodes = random_episodes(case, CPU, torch.float64)
    with FlopCounterMode(display=False) as counter:
        step.measure(episodes, 0, measure_all=False)
    dropped = 0 if first_order else case.inner_steps * case.ways * case.shots * layer_flops(case)[0]
    assert counter.get_total_flops() == meta_step_flops(case) + dropped
    assert meta_step_flops(dataclasses.replace(case, tasks=5)) == 5 * meta_step_flops(case)


def test_flops_of_a_forward_pass_equal_those_computed_by_hand():
    """Omniglot: 28x28, 14x14, 7x7, 3x3; 64 features, 20 ways."""
    wide = 2 * 9 * 64 * 64
    assert layer_flops(CASES[0]) == [2 * 9 * 64 * 784, wide * 196, wide * 49, wide * 9, 2 * 64 * 20]


def test_cases_can_be_read_from_json_and_engines_are_checked():
    for case in CASES:
        assert case_of(json.loads(json.dumps(case.document()))) == case
    assert engine_problem("plain") is None
    assert "unknown engine" in engine_problem("fast")
    assert "unknown engine" in engine_problem("plain-int8")


def test_peers_run_with_the_engines_in_cases_with_the_same_work():
    learners = {(case.name, case.order): names for _, case, names in main_work("", ["plain"], ["higher"])}
    assert len(learners) == 2 * len(CASES)
    assert learners["omniglot-20w1s", "second"] == ["plain", "higher"]
    assert learners["omniglot-20w1s", "first"] == learners["mini-imagenet-5w1s", "second"] == ["plain"]


def test_a_learner_returns_seconds_loss_and_memory():
    facts, answer = open_learner({"case": SMALL.document(), "learner": "plain", "device": "cpu"})
    first, second = answer({"count": 1}), answer({"count": 2})
    assert first["seconds"] > 0
    assert first["peak_bytes"] >= facts["idle_bytes"] > 0
    assert second["loss"] != first["loss"], "Adam has changed nothing"


def test_the_speed_of_matrix_products_is_measured():
    facts, answer = open_machine({"device": "cpu"})
    assert facts["torch"] == torch.__version__
    seconds = answer({"precision": "float32"})["seconds"]
    rates = matrix_rates({"float32": [seconds]}, 2 * facts["matrix_size"] ** 3)
    assert rates["float32"] > 0
    assert answer({"precision": "bf16", "size": PROBE_SIZE})["seconds"] > 0


def test_a_precision_that_is_far_slower_is_skipped_with_its_ratio(monkeypatch):
    machine = Machine.__new__(Machine)
    machine._slower = {}
    times = {"float32": 0.001, "bf16": 0.021, "float64": 0.002}
    monkeypatch.setattr(machine, "_probe", times.__getitem__)
    assert machine.problem("bf16") == "matrix products in bf16 are 21 times slower than in float32"
    assert machine.problem("float32") is None and machine.problem("float64") is None
    (row,) = measure("main", SMALL, ["adjoint-bf16"], Plan("cpu"), machine)
    assert row.skipped == machine.problem("bf16") and not row.seconds


@pytest.mark.process
def test_workers_alternate_and_failures_are_reported(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "executable", preloaded.python())
    machine = Machine("cpu")
    plan = Plan("cpu", repeats=2, official=None)
    plain, official, unknown = measure("main", SMALL, ["plain", "official", "fast"], plan, machine)
    machine.close()
    assert len(plain.seconds) == len(machine.seconds["float32"]) == 2
    assert plain.peak_bytes > plain.idle_bytes / 2 > 0
    assert plain.skipped is None
    assert "few_shot_learning_system" in official.skipped
    assert "unknown engine" in unknown.skipped


def test_the_error_of_a_worker_that_ends_without_an_answer_is_its_last_line():
    with Worker("no_such_module", {}) as worker, pytest.raises(WorkerFailed, match="no_such_module"):
        worker.hear()


def rows_of(part, case, seconds=(0.5, 0.25, 1.0)):
    """Return a row of an engine, a row of a peer, and a skipped row."""
    good = [Row(part, case, name, list(seconds), 2**28, 2**29, 1.5) for name in ("plain", "higher")]
    return [*good, Row(part, case, "adjoint", skipped="this mamlctl has no setting 'engine'")]


def drawn(table):
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue()


def test_tables_show_medians_ranges_and_skipped_learners():
    rates = {"float32": 100.0}
    rows = rows_of("main", CASES[0])
    text = drawn(main_table(rows, rates))
    for word in (
        "omniglot-20w1s",
        "second",
        "0.5",
        "0.25-1",
        "3",
        "1.00x",
        "16",
        "512",
        "no setting 'engine'",
    ):
        assert word in text
    assert "random numbers" in text
    assert "higher" not in text
    assert "higher" in drawn(peers_table(rows, rates))
    assert peers_table([row for row in rows if row.learner == "plain"], rates) is None


def test_growth_tables_have_a_line_per_value():
    rows = [row for case in cases.growth_cases("inner_steps") for row in rows_of("inner_steps", case)]
    text = drawn(growth_table("inner_steps", rows))
    assert all(f" {value} " in text for value in cases.GROWTH["inner_steps"])
    assert "512" in text


def test_json_contains_every_time_and_the_numbers_of_the_tables():
    products = {"float32": {"gflop_per_second": 100.0, "seconds": [0.17]}}
    found = document(rows_of("main", CASES[0]), {"cpu": "some"}, products, date="today")
    found = json.loads(json.dumps(found))
    assert found["version"] == 1
    assert found["date"] == "today"
    plain, _, adjoint = found["rows"]
    assert plain["seconds"] == [0.5, 0.25, 1.0]
    assert plain["median_s"] == 0.5
    assert plain["tasks_per_second"] == 16
    assert plain["share_of_matmul"] == pytest.approx(meta_step_flops(CASES[0]) / 0.5 / 100e9)
    assert adjoint["skipped"]

"""The engine on a CUDA device that is not there: see benchmarks/fake_cuda.py for what it finds."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers.data_cases import image_stream, small_pack, stream_settings
from helpers.engine_cases import IMAGE, random_episodes, small_config
from helpers.own_tables import periodic_csv

if find_spec("triton") is None:
    pytest.skip("torch came without Triton", allow_module_level=True)

from benchmarks.cases import omniglot
from benchmarks.fake_cuda import HostCopyError, fake_cuda
from benchmarks.flops import meta_step_flops
from benchmarks.roofline import REASONS, budget_of
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from mamlctl.data.reading.tables import read_table
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.table_tasks import TableStream, standardisation_of
from mamlctl.engine.derivatives.selection import select_derivatives, tasks_per_pass
from mamlctl.engine.evaluation import evaluator
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest, adapted
from mamlctl.engine.inner_loop import Measurements
from mamlctl.engine.kernels import convolutions
from mamlctl.engine.kernels.triton.ops import MOST_TILES
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.cuda_graphs import Captured
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.engine.training.progress import Period


def on_device(config, device):
    """A meta-step and a meta-batch on the device, in the dtype of its weights."""
    step = MetaStep(config, *build(config, IMAGE, device))
    dtype = step.state.example_tensor.dtype
    moved = [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in random_episodes(config).sets]
    return step, Episodes(*moved)


CASES = [
    {"algo": "maml++", "da": False},
    {"algo": "maml++", "da": False, "precision": "bf16", "clip_norm": 1.0},
    {"algo": "maml++", "da": False, "inner_steps": 7},  # some passes are computed again
    {"algo": "maml++", "da": False, "task_chunk": "1"},
    {"algo": "fomaml"},
    {"algo": "meta-sgd"},
    {"algo": "boil"},
    {"algo": "alpha-maml"},
    {"algo": "reptile", "inner_optimizer": "adam"},
]


@pytest.mark.parametrize("block", ["triton", "torch"])
@pytest.mark.parametrize("settings", CASES, ids=lambda settings: "-".join(map(str, settings.values())))
def test_meta_steps_never_wait_for_the_device(settings, block):
    config = small_config(**{"precision": "float32", **settings})
    with fake_cuda(block) as device:
        step, episodes = on_device(config, device)
        period = Period.empty(config.inner_steps, device)
        for measure_all in (False, True):
            measured = step.measure(episodes, 0, measure_all=measure_all)
            step.apply(measured, 0)
            period.add_no_sync(measured)
        assert measured.meta_loss.device == device
        with pytest.raises(HostCopyError):
            period.means()  # the report, the only place that may wait


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_every_copy_and_cast_of_a_meta_step_has_a_reason(precision):
    """The functions that copy are those in the table, which performance.md repeats."""
    found = budget_of(omniglot(5, 1), precision)
    unused = {"engine/nets/flat.py:cast"} if precision == "tf32" else set()
    assert set(found.copies) == REASONS.keys() - unused


def test_the_counted_flops_are_those_of_the_shapes():
    """Only torch's operations do all of the arithmetic in operations of known FLOPs."""
    case = omniglot(5, 1)
    counted = budget_of(case, "tf32", "torch").flops.total()
    assert abs(counted / meta_step_flops(case) - 1) < 0.01


def test_launches_do_not_grow_unnoticed():
    """582 operations of 20-way and 5-way in TF32 when this bound was last lowered."""
    assert budget_of(omniglot(5, 1), "tf32").launches.total() <= 582


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_convolutions_by_matrix_products_never_wait_for_the_device(monkeypatch, precision):
    monkeypatch.setattr(convolutions, "_method", lambda *arguments: convolutions.PRODUCTS)
    with fake_cuda("torch") as device:
        # With 8 filters or more these are channels last, see nets/flat.py.
        config = small_config(algo="maml++", da=False, precision=precision, filters=16)
        step, episodes = on_device(config, device)
        step.apply(step.measure(episodes, 0, measure_all=True), 0)


@pytest.mark.parametrize("filters", [1, 64, 512])
def test_the_tasks_of_a_pass_fit_the_grid_of_their_kernels(filters):
    """The gradient of the filters has the most programs: three for each tile of 64 x 32 channels."""
    device = torch.device("cuda")
    net, _ = build(small_config(filters=filters), IMAGE, torch.device("cpu"))
    tasks = tasks_per_pass(net, 1, device)
    assert 1 <= tasks * 3 * -(-filters // 64) * -(-filters // 32) <= MOST_TILES


def test_a_capture_never_waits_for_the_device():
    config = small_config(algo="maml++", da=False, precision="float32")

    class Recorded:
        def __init__(self, work):
            work()

        def replay(self):
            pass

    with fake_cuda() as device:
        step, episodes = on_device(config, device)
        runner = Captured(step, record=Recorded)
        for _ in range(3):
            runner.apply(runner.measure(episodes, 0, measure_all=False), 0)


@pytest.mark.parametrize("statistics", list(Statistics))
@pytest.mark.parametrize("block", ["triton", "torch"])
def test_predictions_never_wait_for_the_device(block, statistics):
    config = small_config(algo="maml++", precision="float32")
    with fake_cuda(block) as device:
        step, episodes = on_device(config, device)
        state = step.state.frozen()
        derivatives = select_derivatives(step.net, state.example_tensor)
        sets = TaskSets(derivatives, episodes)
        outputs_ITEN = adapted(PredictRequest(sets, state, 2, statistics))
        scores_TI = evaluator._scores_TI(derivatives, outputs_ITEN, episodes)
        assert scores_TI.device == device


def test_an_evaluation_waits_for_the_device_only_at_its_end(monkeypatch):
    config = small_config(algo="maml++", precision="float32")
    monkeypatch.setattr(evaluator, "tasks_per_pass", lambda *arguments: 1)
    chunks = []
    with fake_cuda() as device, pytest.raises((DataDependentOutputException, HostCopyError)):
        net, state = build(config, IMAGE, device)
        stream = image_stream(
            small_pack([4] * 3, side=16), np.arange(3), split="val", ways=3, shots=2, queries=2, device=device
        )
        plan = evaluator.EvaluationPlan(tasks=3, inner_steps=2, statistics=Statistics.OWN)
        evaluator.evaluate(
            select_derivatives(net, state.example_tensor), [state], stream, plan, on_progress=chunks.append
        )
    assert chunks == [1, 2], "the third chunk is the last"


@pytest.mark.parametrize("augment", ["none", "flips+crops"])
def test_gathering_tasks_never_waits_for_the_device(augment):
    settings = {"split": "train", "ways": 3, "shots": 2, "queries": 2, "channels": 3, "normalize": "imagenet"}
    with fake_cuda() as device:
        stream = image_stream(
            small_pack([5] * 6), np.arange(6), rotations="classes", augment=augment, device=device, **settings
        )
        episodes = stream.episodes(0, 4)
    for tensor in episodes.present().values():
        assert tensor.device == device


def test_drawing_rows_of_a_table_never_waits_for_the_device(tmp_path):
    table = read_table(periodic_csv(tmp_path / "t.csv", tasks=4), "x", "y")
    values = standardisation_of(table, table.tasks)
    with fake_cuda() as device:
        settings = stream_settings(split="train", shots=5, queries=3, device=device)
        episodes = TableStream(table, table.tasks, values, settings).episodes(7, 6)
    assert episodes.query_y_TE.shape == (6, 3, 1)
    for tensor in episodes.present().values():
        assert tensor.device == device


def plant(monkeypatch, wait):
    """Wait for the device wherever a query loss is recorded."""
    add_query = Measurements.add_query

    def waiting(self, *args):
        loss_T = add_query(self, *args)
        wait(loss_T.mean())
        return loss_T

    monkeypatch.setattr(Measurements, "add_query", waiting)


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda loss: loss.item(), DataDependentOutputException),
        (lambda loss: bool(loss > 1), DataDependentOutputException),
        (lambda loss: loss.cpu(), HostCopyError),
        (lambda loss: torch.zeros(()).copy_(loss), HostCopyError),
        (lambda loss: loss + torch.zeros(3), FakeTensorDeviceMismatchError),
    ],
    ids=["item", "condition", "copy", "copy in place", "left on the CPU"],
)
def test_a_planted_wait_is_found(monkeypatch, wait, error):
    plant(monkeypatch, wait)
    with fake_cuda() as device:
        step, episodes = on_device(small_config(algo="maml++", precision="float32"), device)
        with pytest.raises(error):
            step.measure(episodes, 0, measure_all=False)

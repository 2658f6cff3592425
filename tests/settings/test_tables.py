"""Rules derived from the tables of improvements, algorithms and data sets, without torch."""

import subprocess
import sys
from dataclasses import replace

import pytest

from mamlctl.cli.compare import TEST_SETTINGS
from mamlctl.cli.evaluate import TASK_SETTINGS
from mamlctl.core.errors import SettingsError
from mamlctl.data.rules import OF_IMAGES, metric_of
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.algorithms.rules import algorithm_problems
from mamlctl.experiments.grid.plans import ALONE, ORDER
from mamlctl.run_folder import RESUME_OVERRIDES
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.merge import evaluation_settings, merge
from mamlctl.settings.rules import COMPANIONS, VALUE_TYPES
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS, TrainConfig, improvements_without_meaning

WITHOUT_TORCH = """
import sys
import mamlctl.cli.train, mamlctl.report.columns
from mamlctl.data.sets.registry import DATA_SETS
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.plans import improvement_rows
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.settings.schema import IMPROVEMENTS

for algo, entry in ALGORITHMS.items():
    settings = {"algo": algo} | ({"dataset": "navigation"} if entry.needs_rewards else {})
    fill_defaults(resolve_settings([("flag", settings)]).config)
for dataset in DATA_SETS:
    fill_defaults(resolve_settings([("flag", {"dataset": dataset})]).config)
rows = resolve_rows(improvement_rows("one-on", "maml"), [], {}, 0)
assert len(rows) > len(IMPROVEMENTS)
sys.exit("torch" in sys.modules)
"""


def test_registries_settings_and_plans_need_no_torch():
    assert subprocess.run([sys.executable, "-c", WITHOUT_TORCH]).returncode == 0


def test_improvements_have_the_order_of_the_paper():
    assert list(IMPROVEMENTS) == ["msl", "da", "bnrs", "bnwb", "lslr", "ca"]
    assert {name: record.name for name, record in IMPROVEMENTS.items()} == {
        name: name for name in FIELDS if name in IMPROVEMENTS
    }
    assert ORDER == "msl-da-bnrs+bnwb-lslr-ca"
    assert ALONE == ((), ("msl",), ("da",), ("bnrs", "bnwb"), ("bnrs",), ("bnwb",), ("lslr",), ("ca",))
    assert COMPANIONS == {"msl_epochs": "msl", "da_epochs": "da", "min_meta_lr": "ca"}
    for record in IMPROVEMENTS.values():
        assert VALUE_TYPES[TrainConfig][record.name].kind is bool
        assert set(record.companions) <= FIELDS.keys()


def test_unsupported_improvements_are_derived_from_obstacles():
    assert improvements_without_meaning("no unrolled loop") == ("msl", "da", "bnrs", "bnwb", "lslr")
    for algo in ("imaml", "reptile", "transfer", "scratch", "protonet", "nearest"):
        assert {*improvements_without_meaning("no unrolled loop"), "first_order"} <= set(
            ALGORITHMS[algo].unsupported
        )
    assert set(ALGORITHMS["anil"].unsupported) == {"bnrs", "bnwb"}
    assert set(ALGORITHMS["alpha-maml"].unsupported) == {"lslr", "ca", "meta_lr_final"}
    assert {name for name in IMPROVEMENTS if name in OF_IMAGES} == {"bnrs", "bnwb"}


def test_the_error_for_an_unknown_algorithm_lists_all_algorithms():
    ((fact, hint),) = algorithm_problems(TrainConfig(algo="xyzzy"))
    assert fact == "unknown algorithm 'xyzzy'"
    assert hint == f"use one of {', '.join(ALGORITHMS)}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ways", "???"),
        ("ways", True),
        ("ways", 5.0),
        ("ways", None),
        ("ways", [5]),
        ("inner_lr", True),
        ("dataset", ["omniglot"]),
        ("msl", 0.5),
    ],
)
def test_values_of_the_wrong_type_are_skipped_and_reported(name, value):
    resolved, ((fact, _),) = merge(TrainConfig, [("f.yaml", {name: value})])
    assert fact.startswith(f"{name} is {value!r} in f.yaml, which is not ")
    assert resolved.config == TrainConfig()
    assert resolved.sources[name] == "default"


def test_values_are_converted_to_the_types_of_their_settings():
    layer = {"ways": "7", "inner_lr": 1, "msl": "yes", "clip_norm": None, "dataset": 5, "ink": "1"}
    config = merge(TrainConfig, [("f.yaml", layer)])[0].config
    assert (config.ways, config.inner_lr, config.msl, config.clip_norm) == (7, 1.0, True, None)
    assert (config.dataset, config.ink) == ("5", 1)
    assert isinstance(config.inner_lr, float)


def test_an_evaluation_accepts_only_its_own_settings():
    assert evaluation_settings({"tasks": 7, "split": "val"}, "flag") == EvalConfig(tasks=7, split="val")
    with pytest.raises(SettingsError) as caught:
        evaluation_settings({"epochs": 5, "tasks": 1, "split": "tset"}, "flag")
    assert [fact.split(",")[0] for fact, _ in caught.value.problems] == [
        "unknown setting 'epochs' on the command line",
        "--split is 'tset'",
        "--tasks is 1",
    ]


def test_an_evaluation_uses_the_inner_steps_of_the_run_by_default():
    trained = TrainConfig(inner_steps=3)
    assert (trained.evaluation_inner_steps, EvalConfig().over(trained).evaluation_inner_steps) == (3, 3)
    trained = TrainConfig(inner_steps=3, eval_inner_steps=9)
    assert trained.evaluation_inner_steps == 9
    evaluated = EvalConfig(inner_steps=0, bn="running", eval_seed=0).over(trained)
    assert (evaluated.evaluation_inner_steps, evaluated.bn, evaluated.eval_seed) == (0, "running", 0)
    assert evaluated.inner_steps == 3, "training is unchanged"


def test_an_evaluation_replaces_the_settings_that_have_the_same_name():
    replaced = {"queries": 3, "adapts": "head", "inner_lr": 0.5, "dataset": "line", "data_root": "d"}
    evaluated = EvalConfig(**replaced, device="cpu", tasks=7, split="val").over(TrainConfig())
    assert evaluated == replace(TrainConfig(), **replaced, device="cpu")
    assert set(RESUME_OVERRIDES) == {
        "device",
        "data_root",
        "report_every",
        "checkpoint_every",
        "conv",
        "cuda_graph",
        "task_chunk",
    }
    assert {
        "queries",
        "eval_seed",
        "adapts",
        "inner_steps",
        "inner_lr",
        "bn",
        "device",
        "data_root",
        "ways",
        "shots",
    } == TEST_SETTINGS
    assert set(TASK_SETTINGS) == {
        "split",
        "tasks",
        "queries",
        "eval_seed",
        "data_root",
        "dataset",
        "disjoint",
        "label_permutations",
        "allow_overlap",
        "ways",
        "shots",
        "classes",
        "models",
        "per_step",
        "per_step_tasks",
    }


def test_curves_are_scored_by_squared_error():
    metrics = [metric_of(TrainConfig(dataset=dataset)) for dataset in ("sinusoid", "omniglot", "./mine")]
    assert metrics == ["mse", "accuracy", "accuracy"]

"""The receipts of the package, and the picture that is made from them."""

import json

import matplotlib
import pytest
from records import pictures, receipts, tables
from records.experiments import ORDERS, experiments
from records.receipts import problems

from mamlctl.data.sets.registry import has_rewards


def test_every_receipt_of_the_package_is_of_an_experiment_as_it_is_now():
    listed = experiments()
    by_name = {f"{item.name}-s{seed}": item for item in listed for seed in item.seeds}
    for path in receipts.FOLDER.glob("*.json"):
        document = json.loads(path.read_text())
        assert problems(document, by_name[path.stem]) == [], f"remove {path.name} and run `make reproduce`"
        assert path.stem == f"{document['experiment']}-s{document['seed']}"
    for order in ORDERS.values():
        assert set(order) <= {item.name for item in listed}


def test_on_navigation_maml_is_above_pre_training_and_scratch_and_below_the_oracle():
    ends = {}  # of the intervals of the mean return, after each inner step
    for line in tables.lines():
        if has_rewards(line.experiment.config):
            numbers = [map(float, cell.split(" ± ")) for cell in line.returns()]
            ends[line.experiment.name] = [(mean - half, mean + half) for mean, half in numbers]
    maml, transfer, scratch, oracle = (
        ends[f"navigation-20s-{algo}"] for algo in ("maml", "transfer", "scratch", "oracle")
    )
    for step in (1, 3):
        assert maml[step][0] > max(transfer[step][1], scratch[step][1])
    assert oracle[0][0] > maml[3][1]
    straight = -2 * sum((0.5 - 0.1 * time) ** 3 / 3 / 0.5 for time in range(1, 5))
    assert straight == pytest.approx(-2 / 15)
    assert oracle[0][1] < straight


def test_the_picture_has_a_line_for_every_seed_with_a_receipt():
    training = {"validated_s": {"300": 30.0, "600": 90.0}}
    points = [[150, 0.8, 0.01], [300, 0.9, 0.01], [600, 0.98, 0.01]]  # the first has no time
    on_cpu = {"training": training, "validation": {"curve": points}, "environments": [{"device": "cpu"}]}
    # A run that began on a GPU and continued elsewhere.
    moved = on_cpu | {"environments": [{"device": "cuda:0 (NVIDIA H200)"}, {"device": "cpu"}]}
    names = [name for panel in pictures.PANELS for name in panel]
    found = [
        tables.Line(experiment, [on_cpu, on_cpu, moved][: names.index(experiment.name)], None, ())
        for experiment in experiments()
        if experiment.name in names
    ]
    figure = pictures.accuracy_per_minute(found)
    assert [len(ax.lines) for ax in figure.axes] == [0 + 1, 2 + 3]
    minutes, errors = figure.axes[0].lines[0].get_data()
    assert list(minutes) == [0.5, 1.5]
    assert list(errors) == pytest.approx([10, 2])
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == [
        "fast preset",
        "published schedule, partly on a GPU",
    ]


def test_the_picture_is_that_of_the_receipts(tmp_path):
    stored = pictures.FILE.with_suffix(".svg").read_bytes()
    if f"Matplotlib v{matplotlib.__version__}," not in stored.decode():
        pytest.skip("another version of matplotlib draws other paths")
    assert pictures.save(tables.lines(), tmp_path / "new").read_bytes() == stored, "run `make docs`"

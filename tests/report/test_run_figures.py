"""Figures of runs show all the data they are given, mark it correctly, and have no overlapping text."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from mamlctl.report.figures import run_figures, style, training_figure
from mamlctl.report.figures.run_figures import Curve, Panel, TaskPicture

same = np.testing.assert_array_equal

LAYERS = ("conv1.weight", "conv2.weight", "conv3.weight", "conv4.weight", "linear.weight", "linear.bias")
WEIGHTS = ((8, 1, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (5, 32), (5,))
LONG = ["Angelic/character01"] * 20
STARTS = ("meta-learnt (maml)", "pre-trained (transfer)", "random start")
LIGHT = (0.2126, 0.7152, 0.0722)  # weights of red, green and blue in perceived lightness


def sines():
    """Panels of sine waves, with curves that approach the truth with each inner step."""
    rng = np.random.default_rng(0)
    x = np.linspace(-5, 5, 50)
    for height in rng.uniform(0.5, 5, 2):
        support_x = rng.uniform(-5, 5, 5)
        curves = [Curve(s, height * np.sin(x) * (1 - 0.7**s), 4.0 * 0.6**s) for s in (0, 1, 5, 10)]
        panel = (x, height * np.sin(x), support_x, height * np.sin(support_x), curves)
        yield [Panel(title, *panel) for title in STARTS]


def task(ways, shots, queries, *, wrong=0, channels=1, dtype=float, names=None):
    """A task with that many wrong predictions; all its images differ."""
    rng = np.random.default_rng(ways + shots)
    sizes = ((ways, shots, channels, 8, 8), (queries, channels, 8, 8))
    support, query = ((rng.random(size) * (255 if dtype == np.uint8 else 1)).astype(dtype) for size in sizes)
    y = np.arange(queries) % ways
    return TaskPicture(support, query, y, (y + (np.arange(queries) < wrong)) % ways, names)


def metrics(count, inner_steps=5):
    """Reports as in metrics.jsonl."""
    taken = np.arange(inner_steps + 1)
    return [
        {"step": 10 * n, "epoch": n // 10, "support_loss": 1.0, "meta_lr": 0.001 / n}
        | {"query_losses": [*(3.0 / n + taken)], "query_accuracies": [*(0.2 + 0.005 * n + 0.01 * taken)]}
        for n in range(1, count + 1)
    ]


def validations(count, metric="accuracy"):
    """Validations as in metrics.jsonl."""
    rows = np.arange(1, count + 1)
    return [{"step": 50 * n, f"val_{metric}": 0.5 + 0.04 * n, "val_ci95": 0.02 / n} for n in rows.tolist()]


def of_policies(count, **changes):
    """Reports of policies, whose losses are minus their returns."""
    reports = metrics(count, inner_steps=3)
    losses = [[20.0, 8.0 + 12 / n, 3.0 + 16 / n, 0.8 + 18 / n] for n in range(1, count + 1)]
    return [
        row | {"query_losses": of_row, "query_accuracies": []} | changes
        for row, of_row in zip(reports, losses, strict=True)
    ]


def rates_of(*shapes, mean=0.02):
    """Inner learning rates with a standard deviation of 0.02."""
    rng = np.random.default_rng(1)
    every = itertools.cycle(shapes)
    return {layer: rng.normal(mean, 0.02, shape) for layer, shape in zip(LAYERS, every, strict=False)}


PICTURES = {
    "regression": lambda: run_figures.regression(list(sines()), "Sine waves from 5 points"),
    "5-way 1-shot": lambda: run_figures.tasks([task(5, 1, 15, wrong=2)] * 3, "Three tasks"),
    "5-way 5-shot": lambda: run_figures.tasks([task(5, 5, 75, wrong=9, channels=3)], "15 queries per class"),
    "20-way 1-shot": lambda: run_figures.tasks([task(20, 1, 20, wrong=3)], "20-way 1-shot"),
    "20-way, names": lambda: run_figures.tasks([task(20, 1, 300, names=LONG)], "With names"),
    "accuracy": lambda: training_figure.training(metrics(100), validations(10), "accuracy"),
    "mse": lambda: training_figure.training(metrics(100, 10), validations(10, "mse"), "mse"),
    "return": lambda: training_figure.training(of_policies(60), validations(8, "return"), "return"),
    "one report": lambda: training_figure.training(metrics(1), [], "accuracy"),
    "rates by step": lambda: run_figures.rates(rates_of(5, mean=0.1), 0.1, "Learnt rates"),
    "20 steps": lambda: run_figures.rates(rates_of(20), 0.02, "Learnt rates, some negative"),
    "rates by weight": lambda: run_figures.rates(rates_of(*WEIGHTS), 0.02, "Meta-SGD"),
}


def lines_of(ax):
    """The (x, y) data of lines by label."""
    return {line.get_label(): line.get_data() for line in ax.lines}


def texts_of(figure):
    """All texts of a figure."""
    return [text.get_text() for text in figure.findobj(Text)]


@functools.cache
def picture(name):
    """A figure that is shared, because no test changes it."""
    return PICTURES[name]()


@pytest.mark.render
@pytest.mark.parametrize("name", PICTURES)
def test_no_text_overlaps_another_or_leaves_the_figure(name):
    figure = picture(name)
    figure.draw_without_rendering()  # a legend finds its place when it is drawn
    written = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for ax in figure.axes:
        written += [*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        written += ax.get_legend().get_texts() if ax.get_legend() else []
    boxes = [(text.get_text(), text.get_window_extent()) for text in written if text.get_text()]
    assert len(boxes) > 3
    if "way" in name:
        boxes += [("an image", image.get_window_extent()) for image in figure.axes[0].images]
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
    for (text, box), (other, its) in itertools.combinations(boxes, 2):
        across, down = min(box.x1, its.x1) - max(box.x0, its.x0), min(box.y1, its.y1) - max(box.y0, its.y0)
        assert across < 1 or down < 1, (text, other)  # one pixel, because boxes include some margin


def test_regression_draws_the_given_points():
    panels = list(sines())
    figure = run_figures.regression(panels, "Sine waves")
    for panel, ax in zip(itertools.chain(*panels), figure.axes, strict=True):
        drawn = lines_of(ax)
        same(drawn["truth"], (panel.x, panel.truth))
        same(drawn["support set"], (panel.support_x, panel.support_y))
        labels = ("before adaptation", "after 1 step", "after 5 steps", "after 10 steps")
        for label, curve in zip(labels, panel.curves, strict=True):
            same(drawn[label], (panel.x, curve.y))
        errors = [text.get_text() for text in ax.texts]
        assert errors == ["steps\nmse", "0\n4", "1\n2.4", "5\n0.311", "10\n0.0242"]
        assert ax.get_title(loc="left") == panel.title
        # Curves differ in colour and, for readers who cannot see colours, in line style.
        curves = [line for line in ax.lines if line.get_label() in labels]
        assert len({line.get_color() for line in curves}) == 4
        assert len({str(line._unscaled_dash_pattern) for line in curves}) == 4
    heights = [ax.get_ylim() for ax in figure.axes]
    assert heights[:1] * 3 == heights[:3] != heights[3:] == heights[3:4] * 3
    (legend,) = figure.legends
    figure.draw_without_rendering()
    assert {text.get_text() for text in legend.get_texts()} == drawn.keys()
    assert all(legend.get_window_extent().y1 < ax.get_window_extent().y0 for ax in figure.axes)


def test_a_curve_far_from_the_truth_does_not_flatten_it():
    x = np.linspace(-5, 5, 50)
    curves = [Curve(0, np.full(50, np.nan), np.nan), Curve(1, 1e9 * x, np.inf), Curve(2, np.cos(x), 1e-9)]
    figure = run_figures.regression([[Panel("", x, np.sin(x), x[:3], np.sin(x[:3]), curves)]], "")
    low, high = figure.axes[0].get_ylim()
    assert -3 < low < -1 < 1 < high < 3
    assert [text.get_text() for text in figure.axes[0].texts][1:] == ["0\nnan", "1\ninf", "2\n1e-09"]


@pytest.mark.parametrize("dtype", [float, np.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_tasks_show_every_image_in_the_row_of_its_class(dtype, channels):
    given = task(5, 2, 15, wrong=4, channels=channels, dtype=dtype)
    (ax,) = run_figures.tasks([given], "A task").axes
    tops = sorted({image.get_extent()[3] for image in ax.images})
    for top, support, way in zip(tops, given.support_NKCHW, range(5), strict=True):
        row = [image.get_array() for image in ax.images if image.get_extent()[3] == top]
        expected = np.concatenate([support, given.query_MCHW[given.predicted_M == way]])
        shown = np.array(row).reshape(-1, 8, 8, channels) * (255 if dtype == np.uint8 else 1)
        np.testing.assert_allclose(shown, np.moveaxis(expected, 1, -1), atol=1e-12)


@pytest.mark.parametrize("wrong", [0, 1, 4, 15])
def test_wrong_predictions_are_marked_and_right_ones_are_not(wrong):
    given = task(5, 1, 15, wrong=wrong)
    (ax,) = run_figures.tasks([given], "A task").axes
    assert [line.get_marker() for line in ax.lines] == ["X"] * wrong
    thick = [patch for patch in ax.patches if patch.get_linewidth() > 1]
    assert len(ax.patches) == 5 + 15
    assert len(thick) == wrong
    truths = sorted(text.get_text() for text in ax.texts if text.get_text().startswith("is "))
    assert truths == sorted(f"is {y + 1}" for y in given.query_y_M[:wrong])
    # Every mark is at the upper right corner of a thick frame, and every thick frame is around a wrong image.
    marks = {tuple(np.round(np.ravel(line.get_data()), 6)) for line in ax.lines}
    assert marks == {(*patch.get_xy()[1].round(6),) for patch in thick}
    inside = [im for im in ax.images if tuple(np.round(np.take(im.get_extent(), (1, 3)), 6)) in marks]
    shown = {np.squeeze(image.get_array()).tobytes() for image in inside}
    assert shown == {image.tobytes() for image in given.query_MCHW[:wrong]}
    assert f"Task 1: {15 - wrong} of 15 queries right" in texts_of(ax.figure)


CASES = [(5, 1, 15), (5, 5, 15), (5, 5, 75), (20, 1, 20), (20, 1, 300), (20, 5, 100)]


@pytest.mark.parametrize(("ways", "shots", "queries"), CASES)
def test_tasks_are_readable_and_count_the_queries_not_shown(ways, shots, queries):
    figure = run_figures.tasks([task(ways, shots, queries)] * 2, "Two tasks")
    (ax,) = figure.axes
    shown = len(ax.images) - 2 * ways * shots
    assert shown <= 2 * max(run_figures.QUERIES_SHOWN, 3 * ways)
    more = f", {queries - shown // 2} not shown" if shown < 2 * queries else ""
    assert f"Task 2: {queries} of {queries} queries right{more}" in texts_of(figure)
    boxes = np.array([image.get_extent() for image in ax.images])
    assert len(np.unique(boxes.round(6), axis=0)) == len(boxes)
    assert style.DPI * (boxes[0, 1] - boxes[0, 0]) > 50
    assert 900 <= figure.bbox.width <= 1200


def test_training_draws_the_reports_with_gaps_for_missing_values():
    reports = metrics(30)
    reports[7]["query_losses"] = [None] * 6
    reports[9]["query_losses"] = [None, 1.0, 1.0, 1.0, 1.0, None]
    reports[8]["query_accuracies"] = []
    del reports[20]["query_accuracies"]
    reports[11]["meta_lr"] = None
    val = validations(5)
    val[2]["val_accuracy"] = None
    figure = training_figure.training(reports, val, "accuracy")
    top, middle, bottom = figure.axes
    steps = [report["step"] for report in reports]
    for taken in range(6):
        expected = np.array([r["query_losses"][taken] for r in reports], dtype=float)
        same(lines_of(top)[str(taken)], (steps, expected))
    # A value between two gaps is a point, because a line would not show it.
    first = top.lines[0]
    assert first.get_marker() == "." and first.get_markevery() == [8]
    trained = [(r.get("query_accuracies") or [np.nan])[-1] for r in reports]
    same(lines_of(middle)["training tasks"], (steps, trained))
    scores = np.array([v["val_accuracy"] for v in val], dtype=float)
    same(lines_of(middle)["validation tasks,\n95 % interval"], ([v["step"] for v in val], scores))
    same(bottom.lines[0].get_ydata(), np.array([r["meta_lr"] for r in reports], dtype=float))


def test_training_thins_many_inner_steps_and_draws_the_interval_as_a_band():
    val = validations(4, "mse")
    top, middle, _ = training_figure.training(metrics(10, inner_steps=20), val, "mse").axes
    assert list(lines_of(top)) == ["0", "4", "8", "12", "16", "20"]
    light = [np.dot(to_rgba(line.get_color())[:3], LIGHT) for line in top.lines]
    assert light == sorted(light, reverse=True)  # later steps are darker
    assert "training tasks" not in lines_of(middle)  # accuracies do not belong on an mse axis
    points = np.concatenate([path.vertices for band in middle.collections for path in band.get_paths()])
    for entry in val:
        heights = points[points[:, 0] == entry["step"], 1]
        ends = entry["val_mse"] - entry["val_ci95"], entry["val_mse"] + entry["val_ci95"]
        assert (heights.min(), heights.max()) == pytest.approx(ends)


def test_returns_are_drawn_as_negative_numbers_with_the_best_ones_above():
    vals = [row | {"val_return": -20.0 / n} for n, row in enumerate(validations(5, "return"), 1)]
    figure = training_figure.training(of_policies(30), vals, "return")
    top, middle, bottom = figure.axes
    assert [ax.get_title("left") for ax in figure.axes] == [
        "Mean return in training",
        "Validation return",
        "Meta learning rate",
    ]
    for ax in (top, middle):
        assert ax.yaxis_inverted() and ax.get_yscale() == "log"
        places, labels = ax.get_yticks(), [label.get_text() for label in ax.get_yticklabels()]
        assert [float(label.replace("−", "-")) for label in labels] == pytest.approx(list(-places))
    same(middle.lines[0].get_ydata(), np.array([20.0 / n for n in range(1, 6)]))
    assert top.lines[0].get_ydata()[0] > top.lines[-1].get_ydata()[-1] > 0
    assert bottom.get_xlabel() == "meta-step"


def test_steps_inside_a_trust_region_have_no_panel_of_a_learning_rate():
    figure = training_figure.training(of_policies(5, meta_lr=None), validations(5, "return"), "return")
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "meta-step"]
    positive = [row | {"query_losses": [1.0, -0.5]} for row in of_policies(5, meta_lr=None)]
    (top,) = training_figure.training(positive, [], "return").axes
    assert top.get_yscale() == "linear" and top.yaxis_inverted()


NOTHING = {"step": 1, "query_losses": [None, None], "meta_lr": None}
SHORT = [
    (metrics(1), [], 3),
    (metrics(1), [{"step": 10, "val_accuracy": 0.5, "val_ci95": None}], 3),
    ([NOTHING | {"query_losses": [2.0, 1.0]}], [], 2),
    ([NOTHING], [], 2),
    ([], validations(1), 3),
    ([], [], 2),
]


@pytest.mark.parametrize(("reports", "vals", "panels"), SHORT)
def test_short_and_empty_runs_are_drawn(reports, vals, panels, tmp_path):
    figure = training_figure.training(reports, vals, "accuracy")
    assert len(figure.axes) == panels
    style.save(figure, tmp_path / "short")
    points = [line for ax in figure.axes for line in ax.lines]
    assert all(line.get_marker() == "." for line in points)  # no line shows a single value
    drawn = sum(np.isfinite(line.get_ydata()).sum() for line in figure.axes[0].lines)
    assert drawn == sum(loss is not None for r in reports for loss in r["query_losses"])


@pytest.mark.parametrize("name", ["accuracy", "mse", "one report"])
def test_losses_are_on_a_log_axis_and_every_legend_has_a_title(name):
    figure = picture(name)
    top, *middle, bottom = figure.axes
    assert top.get_yscale() == "log"
    assert [ax.get_yscale() for ax in middle] == ["log" if name == "mse" else "linear"]
    assert bottom.get_yscale() == "linear"
    titles = [ax.get_legend().get_title().get_text() for ax in figure.axes if ax.get_legend()]
    assert titles == ["inner steps taken", "measured on"]
    figure.draw_without_rendering()
    low, high = top.get_ylim()
    ticks = [*top.yaxis.get_majorticklocs(), *top.yaxis.get_minorticklocs()]
    assert sum(low <= tick <= high for tick in ticks) > 2
    assert picture("regression").legends[0].get_title().get_text() == "The task, and its curve as predicted"


def test_a_loss_of_zero_keeps_the_axis_linear():
    reports = metrics(5)
    reports[2]["query_losses"][0] = 0.0
    top, *_ = training_figure.training(reports, [], "accuracy").axes
    assert top.get_yscale() == "linear"


@pytest.mark.parametrize(("mean", "limit"), [(0.3, 0.25), (0.0, 1.0)])
def test_rates_by_step_are_a_heat_map_around_the_initial_rate(mean, limit):
    given = rates_of(5, mean=mean)
    given["linear.bias"][2] = np.nan
    initial = mean or 0.01
    ax, key = run_figures.rates(given, initial, "Learnt rates").axes
    table = np.stack(list(given.values()))
    (mesh,) = ax.collections
    changed = mesh.get_array().reshape(table.shape)
    np.testing.assert_allclose(np.ma.filled(changed, np.nan), table / initial - 1)
    assert mesh.get_clim() == pytest.approx((-limit, limit))
    assert key.get_xlabel() == f"change from the initial rate of {initial:g}"
    written = {text.get_position(): text for text in ax.texts}
    assert len(written) == np.isfinite(table).sum()
    for (row, step), rate in np.ndenumerate(table):
        if np.isfinite(rate):
            text = written[step + 0.5, row + 0.5]
            assert abs(float(text.get_text().replace("−", "-")) - rate) <= 0.005 * np.nanmax(abs(table))
            cell, ink = mesh.to_rgba(rate / initial - 1)[:3], to_rgba(text.get_color())[:3]
            assert contrast(cell, ink) > 4.5, rate
    assert [label.get_text() for label in ax.get_yticklabels()] == list(LAYERS)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "3", "4", "5"]


def contrast(*colours):
    """The contrast ratio of two colours as WCAG 2 defines it: 1 to 21."""
    rgb = np.array(colours)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    low, high = sorted(linear @ LIGHT)
    return (high + 0.05) / (low + 0.05)


def test_histograms_of_rates_count_every_weight():
    given = rates_of(*WEIGHTS)
    given["conv1.weight"][0, 0, 0, 0] = 0.0  # not counted as negative
    given["conv2.weight"][:] = 0.05
    given["conv3.weight"] *= -1000  # sets the range
    for ax, (layer, values) in zip(run_figures.rates(given, 0.02, "").axes, given.items(), strict=True):
        above, below = (patch.get_data() for patch in ax.patches)
        assert above.values[above.edges[:-1] >= 0].sum() == above.values.sum() == (values >= 0).sum()
        assert below.values[below.edges[1:] <= 0].sum() == below.values.sum() == (values < 0).sum()
        share = f"{100 * (values < 0).mean():.1f} % negative"
        assert [text.get_text() for text in ax.texts] == [f"{values.size:,} rates\n{share}"]
        assert ax.get_ylabel() == layer


@pytest.mark.parametrize("rate", [0.0, 0.1, -0.1])
def test_equal_rates_are_drawn(rate):
    text = run_figures.rates({"w": np.full(5, rate)}, 0.1, "").axes[0].texts[0].get_text()
    assert float(text.replace("−", "-")) == rate
    (ax,) = run_figures.rates({"w": np.full((5, 5), rate)}, 0.1, "").axes
    assert [patch.get_data().values.sum() for patch in ax.patches] == ([0, 25] if rate < 0 else [25, 0])


@pytest.mark.render
@pytest.mark.parametrize("name", PICTURES)
def test_saved_figures_can_be_opened_and_are_reproducible_to_the_byte(name, tmp_path):
    figure = picture(name)
    png, svg = style.save(figure, tmp_path / "new" / "folder" / "run-0.5")
    assert sorted(path.name for path in png.parent.iterdir()) == ["run-0.5.png", "run-0.5.svg"]
    with Image.open(png) as image:
        image.load()
        assert 900 <= image.width <= (1200 if name != "20 steps" else 1350)
        assert 200 <= image.height <= 1500
        assert image.getpixel((1, 1))[:3] == (255, 255, 255)
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<dc:date>" not in svg.read_bytes()
    for again in [PICTURES[name](), figure][: 1 + (name == "one report")]:
        other = style.save(again, tmp_path / "again")
        assert [path.read_bytes() for path in other] == [png.read_bytes(), svg.read_bytes()]


def test_markup_in_texts_is_not_interpreted(tmp_path):
    figure = run_figures.rates({"$w$": np.array([0.1])}, 0.1, "$\\nope$, runs/日本\x1b[31m_{x}")
    style.save(figure, tmp_path / "odd")
    assert {"$\\nope$, runs/???[31m_{x}", "$w$"} <= set(texts_of(figure))


PROGRAM = """
import sys
from mamlctl.report.figures import run_figures, style, training_figure
assert "matplotlib" not in sys.modules and "torch" not in sys.modules
import matplotlib, pathlib, numpy as np
before = dict(matplotlib.rcParams.copy())
style.save(run_figures.rates({"w": np.array([0.1, 0.2])}, 0.1, "Rates"), pathlib.Path(sys.argv[1]))
training_figure.training([{"step": 1, "query_losses": [1.0], "meta_lr": 1.0}], [], "mse")
y = np.zeros(1, int)
run_figures.tasks([run_figures.TaskPicture(np.zeros((1, 1, 1, 8, 8)), np.zeros((1, 1, 8, 8)), y, y)], "Task")
x = np.zeros(3)
run_figures.regression([[run_figures.Panel("p", x, x, x, x, [run_figures.Curve(0, x, 1.0)])]], "Sine")
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams.copy()) == before
"""


def test_importing_does_not_load_matplotlib_and_drawing_changes_no_globals(tmp_path):
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "plot")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Streams of curves: task i is a pure function of (seed, split, i), with the published distributions."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.data_cases import stream_settings

from mamlctl.data.counter_rng import random_word_rows, random_words
from mamlctl.data.sets.curves import FAMILIES, Normal, Uniform
from mamlctl.data.tasks import curve_tasks
from mamlctl.data.tasks.curve_tasks import CurveStream

MANY = 20_000
each_family = pytest.mark.parametrize("name", list(FAMILIES))


def stream(name="sinusoid", **changes):
    settings = {"split": "train", "seed": 3, "shots": 5, "queries": 4, "dtype": torch.float64}
    return CurveStream(FAMILIES[name], stream_settings(**{**settings, **changes}))


def parts(episodes):
    return [episodes.support_x_TECHW, episodes.support_y_TE, episodes.query_x_TECHW, episodes.query_y_TE]


def normal(u, v):
    return math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)


def sinusoid(u):
    amplitude, phase = 0.1 + 4.9 * u[0], math.pi * u[1]
    return lambda x: amplitude * math.sin(x - phase)


def line(u):
    slope, intercept = 6 * u[0] - 3, 6 * u[1] - 3
    return lambda x: slope * x + intercept


def harmonic(u):
    a1, a2, b1, b2 = normal(u[4], u[5]), normal(u[6], u[7]), 2 * math.pi * u[2], 2 * math.pi * u[3]
    frequency = 5 + 2 * u[1]
    return lambda x: a1 * math.sin(frequency * x + b1) + a2 * math.sin(2 * frequency * x + b2)


# Each family again in plain Python: words of the numbers, words per point, curve, point.
PLAIN = {
    "sinusoid": (2, 1, sinusoid, lambda u, point: 10 * point[0] - 5),
    "line": (2, 1, line, lambda u, point: 10 * point[0] - 5),
    "harmonic": (8, 2, harmonic, lambda u, point: 8 * u[0] - 4 + normal(*point)),
}


def plain_task(name, seed, split, task, shots, queries):
    """The support x, support y, query x and query y of one task, word by word."""
    numbers, width, curve, place = PLAIN[name]
    words = random_words(seed, split, task, numbers + 2 * width * max(shots, queries))
    u = [(int(word) >> 11) / 2**53 for word in words]
    points = [u[start : start + width] for start in range(numbers, len(u), width)]
    support_x = [place(u, point) for point in points[0::2][:shots]]
    query_x = [place(u, point) for point in points[1::2][:queries]]
    y = curve(u)
    return support_x, [y(x) for x in support_x], query_x, [y(x) for x in query_x]


@each_family
@pytest.mark.parametrize(("shots", "queries"), [(10, 10), (1, 7), (6, 2)])
def test_tasks_are_their_closed_forms_word_by_word(name, shots, queries):
    drawn = stream(name, shots=shots, queries=queries, split="val").episodes(11, 40)
    assert drawn.support_x_TECHW.shape == (40, shots, 1)
    assert drawn.query_x_TECHW.shape == (40, queries, 1)
    for task in range(40):
        values = [part[task].ravel().tolist() for part in parts(drawn)]
        for got, want in zip(values, plain_task(name, 3, "val", 11 + task, shots, queries), strict=True):
            # Only rounding: an angle of up to 14 * 8 turns an error of 1e-16 into one of 1e-14.
            assert got == pytest.approx(want, rel=0, abs=1e-12)


def test_words_of_several_tasks_are_the_raw_words_of_each():
    for words in range(1, 10):
        for first in (0, 5, 2**40, 2**64 - 3):
            want = np.stack([random_words(7, "test", first + task, words) for task in range(3)])
            assert (random_word_rows(7, "test", first, 3, words) == want).all()


@each_family
def test_formula_equals_the_curve(name):
    family = FAMILIES[name]
    uniform_P = np.random.default_rng(0).random(family.words)
    numbers, x_K = family.numbers(uniform_P), np.linspace(*family.window, 30)
    scalars = {key: float(value) for key, value in numbers.items()}
    want = [eval(family.formula, {"sin": math.sin, **scalars, "x": x}) for x in x_K.tolist()]
    assert family.curve(numbers, x_K).tolist() == pytest.approx(want, rel=0, abs=1e-12)


def chi_square(values, low, high, bins=20):
    """The chi-square statistic against the uniform law on [low, high], which must contain all values."""
    assert low <= values.min()
    assert values.max() <= high
    counts, _ = np.histogram(values, bins=bins, range=(low, high))
    expected = len(values) / bins
    return ((counts - expected) ** 2 / expected).sum()


def assert_uniform(values, low, high):
    """Values are uniform on [low, high].

    Bounds: the 99.9 % quantile of chi-square with 19 degrees of freedom, and 4 standard errors of the mean.
    """
    assert chi_square(values, low, high) < 43.8
    assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values))


def assert_uncorrelated(*columns):
    """No two columns have a correlation above four standard errors."""
    apart = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(apart).max() < 4 / math.sqrt(len(columns[0]))


def first_points(tasks):
    """The first support point and the first query point of many tasks."""
    drawn = tasks.episodes(0, MANY)
    return drawn.support_x_TECHW[:, 0, 0].numpy(), drawn.query_x_TECHW[:, 0, 0].numpy()


def test_sinusoids_have_uniform_amplitudes_phases_and_points():
    tasks = stream(shots=1, queries=1)
    # y(0) = -A sin(phase), y(pi / 2) = A cos(phase)
    ends = np.stack([tasks.curve(task, np.array([0.0, math.pi / 2])) for task in range(MANY)])
    amplitude, phase = np.hypot(*ends.T), np.arctan2(-ends[:, 0], ends[:, 1])
    support_x, query_x = first_points(tasks)
    assert_uniform(amplitude, 0.1, 5.0)
    assert_uniform(phase, 0.0, math.pi)
    assert_uniform(support_x, -5.0, 5.0)
    assert_uniform(query_x, -5.0, 5.0)
    assert_uncorrelated(amplitude, phase, support_x, query_x)


def test_lines_have_uniform_slopes_intercepts_and_points():
    tasks = stream("line", shots=1, queries=1)
    intercept, end = np.stack([tasks.curve(task, np.array([0.0, 1.0])) for task in range(MANY)]).T
    support_x, query_x = first_points(tasks)
    assert_uniform(intercept, -3.0, 3.0)
    assert_uniform(end - intercept, -3.0, 3.0)
    assert_uniform(support_x, -5.0, 5.0)
    assert_uniform(query_x, -5.0, 5.0)
    assert_uncorrelated(end - intercept, intercept, support_x, query_x)


def assert_mean(values, expected):
    """The mean is within four standard errors of the expected value."""
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))


def test_harmonics_have_the_moments_of_their_laws():
    drawn = stream("harmonic", shots=10, queries=1).episodes(0, MANY)
    x_TE, y_TE = drawn.support_x_TECHW[..., 0].numpy(), drawn.support_y_TE.numpy()
    support_x, query_x = x_TE[:, 0], drawn.query_x_TECHW[:, 0, 0].numpy()
    assert_mean(support_x, 0)
    assert_mean(support_x**2, 8**2 / 12 + 1)  # variance of the centres plus that around them
    assert_mean(x_TE.var(1, ddof=1), 1)
    assert_mean(support_x * query_x, 8**2 / 12)  # they share only the centre
    assert_mean(y_TE[:, 0], 0)
    assert_mean(y_TE[:, 0] ** 2, 1)  # E a1² / 2 + E a2² / 2
    assert_mean(y_TE[:, 0] ** 4, 2 * 3 * 3 / 8 + 6 / 4)  # E a⁴ = 3, E sin⁴ = 3/8, mean of each term² 1/2


def test_quantiles_of_normal_numbers_are_uniform():
    uniform_2M = ((random_words(0, "train", 0, 2 * MANY) >> np.uint64(11)) / 2.0**53).reshape(2, MANY)
    drawn = Normal(2.0, 3.0)(uniform_2M)
    # The distribution function is that of the module `statistics`.
    law = statistics.NormalDist(2.0, 3.0)
    assert_uniform(np.array([law.cdf(value) for value in drawn]), 0.0, 1.0)
    assert drawn.std() == pytest.approx(3, abs=4 * 3 / math.sqrt(2 * MANY))


def test_smallest_and_largest_word_give_finite_numbers():
    ends_2K = np.array([[0.0, 1 - 2.0**-53], [0.0, 0.0]])
    assert Normal(0.0, 1.0)(ends_2K) == pytest.approx([0, math.sqrt(106 * math.log(2))])
    least, greatest = Uniform(-3.0, 3.0)(ends_2K)
    assert least == -3
    assert greatest == pytest.approx(3)


@each_family
def test_task_is_the_same_in_every_batch_and_order(name):
    whole = parts(stream(name).episodes(40, 30))
    one_stream = stream(name)
    for first, size in ((65, 5), (40, 1), (69, 1), (42, 17), (40, 30)):
        for part, piece in zip(whole, parts(one_stream.episodes(first, size)), strict=True):
            assert torch.equal(part[first - 40 : first - 40 + size], piece)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tasks_drawn_ahead_equal_tasks_drawn_one_by_one(name, dtype, monkeypatch):
    ahead = stream(name, dtype=dtype)
    drawn = [ahead.episodes(first, 25) for first in range(0, 2500, 25)]
    monkeypatch.setattr(curve_tasks, "DRAWN", 1)
    alone = stream(name, dtype=dtype)
    for number in (0, 1, 24, 25, 999, 1777, 2499):
        for part, single in zip(parts(drawn[number // 25]), parts(alone.episodes(number, 1)), strict=True):
            assert torch.equal(part[number % 25 : number % 25 + 1], single)


@each_family
def test_streams_of_different_sizes_share_curves_and_first_points(name):
    few = stream(name, shots=3, queries=2)
    few_x, few_y, few_query_x, few_query_y = parts(few.episodes(0, 9))
    for shots, queries in ((3, 11), (8, 2), (8, 11), (5, 5)):
        many = stream(name, shots=shots, queries=queries)
        x, y, query_x, query_y = parts(many.episodes(0, 9))
        assert torch.equal(x[:, :3], few_x)
        assert torch.equal(y[:, :3], few_y)
        assert torch.equal(query_x[:, :2], few_query_x)
        assert torch.equal(query_y[:, :2], few_query_y)
        assert (many.curve(4, np.arange(6.0)) == few.curve(4, np.arange(6.0))).all()


@each_family
def test_no_two_points_and_no_two_curves_are_equal(name):
    """Over seeds and splits; the probability that one of 1,080 53-bit numbers repeats is 1e-10."""
    streams = [stream(name, **change) for change in ({}, {"seed": 4}, {"split": "val"}, {"split": "test"})]
    drawn = [tasks.episodes(0, 30) for tasks in streams]
    points = torch.cat([x.ravel() for each in drawn for x in parts(each)[::2]])
    assert len(points.unique()) == len(points) == 4 * 30 * 9
    heights = [float(tasks.curve(task, np.array(0.5))) for tasks in streams for task in range(30)]
    assert len(set(heights)) == 120


@each_family
def test_true_curve_passes_through_every_point(name):
    tasks = stream(name)
    support_x, support_y, query_x, query_y = (part.numpy() for part in parts(tasks.episodes(20, 15)))
    for task in range(15):
        assert (tasks.curve(20 + task, support_x[task, :, 0]) == support_y[task]).all()
        assert (tasks.curve(20 + task, query_x[task, :, 0]) == query_y[task]).all()
    grid = np.linspace(-5, 5, 6).reshape(2, 3)
    assert (tasks.curve(0, grid).ravel() == tasks.curve(0, grid.ravel())).all()


@each_family
def test_float32_is_float64_rounded_once(name):
    double = parts(stream(name).episodes(0, 25))
    single = parts(stream(name, dtype=torch.float32).episodes(0, 25))
    for exact, rounded in zip(double, single, strict=True):
        assert exact.dtype == torch.float64
        assert rounded.dtype == torch.float32
        assert torch.equal(exact.float(), rounded)
        assert rounded.is_contiguous()


def test_stream_has_the_attributes_of_a_stream_of_image_tasks():
    tasks = stream(shots=6, device=torch.device("meta"))
    assert (tasks.split, tasks.seed, tasks.ways, tasks.shots, tasks.queries) == ("train", 3, 1, 6, 4)
    assert tasks.device == torch.device("meta")
    episodes = tasks.episodes(0, 5)
    assert all(part.device == tasks.device for part in parts(episodes))
    assert [len(some.query_y_TE) for some in episodes.split(2)] == [2, 2, 1]


def test_digest_depends_only_on_what_determines_the_tasks():
    family = FAMILIES["sinusoid"]
    changes = [
        {"laws": {**family.laws, "amplitude": Uniform(0.1, 5.1)}},
        {"laws": {**family.laws, "phase": Normal(0.0, math.pi)}},
        {"laws": dict(reversed(family.laws.items()))},
        {"inputs": Uniform(-5.0, 6.0)},
        {"centre": "phase"},
        {"formula": "amplitude * sin(x + phase)"},
    ]
    digests = {replace(family, **change).digest for change in changes}
    digests |= {kept.digest for kept in FAMILIES.values()}
    assert len(digests) == len(changes) + 3
    assert replace(family, summary="", window=(0.0, 1.0)).digest == family.digest


# Stored runs depend on these: another digest means other tasks under the old name.
KEPT = {
    "sinusoid": "6f2e0ae812e512c9b3dabdac1db62430d0026dcc6cf5f9998fd91fec28bbc9cd",
    "line": "487f2be1d236d0182e0fdc3f17a9715281842e89cc4860f7b45e2cb686d4fc0a",
    "harmonic": "32c91b98c541c128202cf48bb1265744463b3eb2423c7691e9c55e26bcb6d699",
}


@each_family
def test_stored_digests_are_unchanged(name):
    assert FAMILIES[name].name == name
    assert FAMILIES[name].digest == KEPT[name]


@pytest.mark.gpu
def test_gpu_has_the_same_tasks():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    on_cpu, on_gpu = (
        stream("harmonic", device=torch.device(name)).episodes(7, 5) for name in ("cpu", "cuda")
    )
    for cpu, gpu in zip(parts(on_cpu), parts(on_gpu), strict=True):
        assert gpu.is_cuda
        assert torch.equal(cpu, gpu.cpu())

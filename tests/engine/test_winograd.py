"""Winograd's convolutions in C, compared with torch's direct convolutions in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers.derivative_cases import needs_c
from helpers.engine_cases import small_config

from mamlctl.core.errors import SettingsError
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.kernels import c_library
from mamlctl.engine.kernels.convolutions import Direct, conv_backward
from mamlctl.engine.kernels.winograd import Winograd
from mamlctl.engine.training.initial_state import build
from mamlctl.settings.merge import stored_settings

pytestmark = needs_c

# Tasks, examples, height, width, input and output channels: every map of both data sets, widths that are no
# multiple of a vector, maps smaller than a tile, and enough tiles for several groups of images.
SHAPES = [
    (2, 20, 14, 14, 64, 64),
    (3, 5, 7, 7, 48, 48),
    (1, 4, 3, 3, 64, 64),
    (2, 3, 42, 42, 16, 16),
    (1, 3, 21, 21, 48, 48),
    (2, 75, 10, 10, 16, 16),
    (1, 2, 84, 84, 3, 16),
    (2, 3, 28, 28, 1, 64),
    (2, 2, 5, 6, 3, 5),
    (1, 1, 1, 1, 20, 17),
]
# Error relative to the norm in float32. Measured: 2.3e-6 at most; by a direct convolution 1e-6.
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-5}


def operands(shape, dtype):
    """Inputs x and x_t, output gradients g and g_t, weights w and w_t."""
    tasks, examples, height, width, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)

    def images(channels):
        size = examples, height, width, tasks * channels
        return torch.randn(size, generator=generator, dtype=dtype).permute(0, 3, 1, 2)

    def weights():
        return torch.randn((tasks * outputs, inputs, 3, 3), generator=generator, dtype=dtype)

    return [*(images(inputs) for _ in "xx"), *(images(outputs) for _ in "gg"), weights(), weights()]


def results(make, shape, values):
    """Every output of a convolution, with summed summands."""
    x, x_t, g, g_t, w, w_t = values
    conv = make(w, shape[0])
    c, (gx, gw) = conv(x), conv.backward(g, x)
    c_t, c_2 = conv.tangent(x, x_t, w_t)
    gx_t, gx_2, gw_t = conv.tangent_backward(g_t, x, g, x_t)
    c_t = c_t if c_2 is None else c_t + c_2
    gx_t = gx_t if gx_2 is None else gx_t + gx_2
    return {"c": c, "gx": gx, "gw": gw, "c_t": c_t, "gx_t": gx_t, "gw_t": gw_t}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_convolutions_and_their_gradients_equal_the_direct_ones(shape, dtype):
    values = operands(shape, dtype)
    expected = results(Direct, shape, [value.double() for value in values])
    for name, value in results(Winograd, shape, values).items():
        error = (value.double() - expected[name]).norm() / expected[name].norm()
        assert value.shape == expected[name].shape and float(error) < CLOSE[dtype], (name, float(error))


def test_the_direct_convolution_is_torch_s():
    shape = (2, 3, 5, 6, 3, 4)
    x, x_t, g, g_t, w, w_t = values = operands(shape, torch.float64)

    def conv(x, w):
        return F.conv2d(x, w, padding=1, groups=2)

    found = results(Direct, shape, values)
    assert torch.allclose(found["c"], conv(x, w))
    assert torch.allclose(found["c_t"], conv(x, w_t) + conv(x_t, w))
    for one, other in (("gx", "gw"), ("gx_t", "gw_t")):
        pairs = [(g, x, w)] if one == "gx" else [(g_t, x, w), (g, x_t, w_t)]
        parts = [conv_backward(*pair, 2, by_input=True) for pair in pairs]
        for name, side in ((one, 0), (other, 1)):
            assert torch.allclose(found[name], sum(part[side] for part in parts))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[5], SHAPES[8]])
def test_results_depend_neither_on_threads_nor_on_other_tasks(shape):
    tasks, values = shape[0], operands(shape, torch.float32)
    whole = results(Winograd, shape, values)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        by_three = results(Winograd, shape, values)
    finally:
        torch.set_num_threads(threads)

    def of_last(value):
        """The values of the last task; weights have the tasks on the first axis."""
        share = value.chunk(tasks, 0 if value.shape[-1] == 3 and value.shape[-2] == 3 else 1)[-1]
        return share.clone(memory_format=torch.preserve_format)

    alone = [of_last(value) for value in values]
    alone = [*(v.contiguous(memory_format=torch.channels_last) for v in alone[:4]), *alone[4:]]
    last = results(Winograd, (1, *shape[1:]), alone)
    for name, value in whole.items():
        assert torch.equal(value, by_three[name]), name
        assert torch.equal(of_last(value), last[name]), name


@pytest.mark.parametrize("tuning", [("-march=x86-64-v3",), ()], ids=["AVX2", "baseline"])
def test_other_instruction_sets_give_the_same_results(tuning, monkeypatch, tmp_path):
    """Vectors have another length there."""
    monkeypatch.setattr(c_library.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(c_library, "TUNING", tuning)
    built = c_library.library.__wrapped__(torch.float32)
    shape = (2, 6, 7, 6, 20, 24)
    values = operands(shape, torch.float32)
    here = results(Winograd, shape, values)
    monkeypatch.setattr(c_library, "library", lambda dtype: built)
    _forget_sizes()
    try:
        for name, value in results(Winograd, shape, values).items():
            assert torch.allclose(value, here[name], rtol=1e-4, atol=1e-4), name
    finally:
        _forget_sizes()


def _forget_sizes():
    from mamlctl.engine.kernels import winograd

    winograd._plan.cache_clear()


def test_auto_is_winograd_in_float32_only():
    chosen = {
        ("auto", "float32"): Winograd,
        ("auto", "float64"): Direct,
        ("auto", "bf16"): Direct,
        ("direct", "float32"): Direct,
        ("winograd", "float64"): Winograd,
    }
    for (conv, precision), expected in chosen.items():
        net, state = build(small_config(conv=conv, precision=precision), (1, 16, 16), torch.device("cpu"))
        assert select_derivatives(net, state.example_tensor).make_conv is expected, (conv, precision)


@pytest.mark.parametrize(("setting", "value"), [("precision", "bf16"), ("engine", "plain")])
def test_winograd_is_refused_where_it_has_no_effect(setting, value):
    with pytest.raises(SettingsError, match=f"--conv winograd has no effect with --{setting} {value}"):
        stored_settings("a file", {"conv": "winograd", setting: value})

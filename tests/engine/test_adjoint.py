"""The adjoint and the hand-written derivatives, compared with double backward through the unrolled loop."""

import importlib
import itertools
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.derivative_cases import (
    BY_HAND,
    CPU,
    HAS_C,
    IMAGES,
    SETTINGS,
    WAYS,
    assert_equal_measurements,
    measured_by,
    needs_c,
    prepared,
)
from helpers.engine_cases import small_config

from mamlctl.core.errors import MamlctlError
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.algorithms import adjoint as adjoint_module
from mamlctl.engine.algorithms.adjoint import adjoint
from mamlctl.engine.algorithms.meta_gradient import unrolled
from mamlctl.engine.derivatives import selection
from mamlctl.engine.derivatives.autograd import Autograd, AutogradSet
from mamlctl.engine.derivatives.conv4 import unprepared
from mamlctl.engine.derivatives.selection import agree, select_derivatives, slower_than_it_could_be
from mamlctl.engine.devices import times_slower
from mamlctl.engine.kernels import c_block, c_library
from mamlctl.engine.kernels.block import BlockSettings, TorchTape
from mamlctl.engine.kernels.convolutions import Direct
from mamlctl.engine.kernels.head import TorchHead
from mamlctl.engine.kernels.winograd import Winograd
from mamlctl.engine.nets.base import LEAK
from mamlctl.engine.nets.batch_norm import EPS, NormPass, Statistics
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.experiments.settings import fill_defaults

triton_block = importlib.import_module("mamlctl.engine.kernels.triton.block") if find_spec("triton") else None


PLAIN = TorchTape, unprepared, TorchHead
needs_triton = pytest.mark.skipif(triton_block is None, reason="torch came without Triton")


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize(("settings", "image"), list(itertools.product(SETTINGS, IMAGES)))
@pytest.mark.parametrize("way", ["autograd", *BY_HAND])
def test_adjoint_equals_double_backward(way, settings, image, first_order):
    learner = prepared(image, **settings)
    expected = measured_by(unrolled, *learner, first_order)
    result = measured_by(adjoint, *learner, first_order, derivatives=WAYS[way](learner[1]))
    assert_equal_measurements(result, expected, learner[2])


def block_by_autograd(x, weight, gamma, beta, groups):
    """The block, written in the usual way."""
    c = F.conv2d(x, weight, padding=1, groups=groups)
    mean, var = c.mean((0, 2, 3), keepdim=True), c.var((0, 2, 3), correction=0, keepdim=True)
    z = (c - mean) / (var + EPS).sqrt() * gamma.view(1, -1, 1, 1) + beta.view(1, -1, 1, 1)
    return F.max_pool2d(F.leaky_relu(z, LEAK), 2)


@pytest.mark.parametrize("first", [False, True], ids=["inner", "first"])
@pytest.mark.parametrize("way", [*BY_HAND, pytest.param("triton", marks=needs_triton)])
def test_first_and_second_derivatives_of_a_block_equal_autograd(way, first):
    generator = torch.Generator().manual_seed(3)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    # Small sizes, because Triton's interpreter runs the programs one after another.
    tasks, channels, filters, examples = (2, 2, 3, 3) if way == "triton" else (3, 2, 5, 4)
    x, weight = normal(examples, tasks * channels, 7, 6), normal(tasks * filters, channels, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)
    gamma, beta = normal(tasks * filters), normal(tasks * filters)
    x_t = None if first else normal(*x.shape).contiguous(memory_format=torch.channels_last)
    weight_t = normal(*weight.shape)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, gamma, beta)]
    out = block_by_autograd(*leaves, tasks)
    ga, ga_t = normal(*out.shape), normal(*out.shape)
    ga, ga_t = (part.contiguous(memory_format=torch.channels_last) for part in (ga, ga_t))
    grads = torch.autograd.grad((out * ga).sum(), leaves, create_graph=True)
    # The tangent of the gradient along (x_t, weight_t), with ga along ga_t: differentiate the inner product
    # of the gradient with (x_t, weight_t), and add the gradient for ga_t.
    along = sum(((grads[1] * weight_t).sum(), *(() if first else ((grads[0] * x_t).sum(),))))
    seconds = torch.autograd.grad(along, leaves, retain_graph=True, materialize_grads=True)
    by_ga = torch.autograd.grad((out * ga_t).sum(), leaves, retain_graph=True)
    moved = torch.autograd.functional.jvp(
        lambda x, w: block_by_autograd(x, w, gamma, beta, tasks),
        (x, weight),
        (torch.zeros_like(x) if first else x_t, weight_t),
    )[1]

    make = {
        "torch": TorchTape,
        "c": c_block.native_block,
        "winograd": c_block.native_block,
        "triton": triton_block and triton_block.TritonBlocks.on(CPU),
    }[way]
    # Triton passes Python numbers as float32, here batch norm's epsilon and the slope of the activation.
    near = {"atol": 1e-6 if way == "triton" else 1e-10}
    prepare = {"c": c_block, "winograd": c_block, "triton": triton_block}.get(way)
    planes = prepare.prepare(x, tasks, None) if prepare and first else None
    make_conv = Winograd if way == "winograd" else Direct
    settings = BlockSettings(groups=tasks, compute=None, first=first, make_conv=make_conv, planes=planes)
    tape = make(x, weight, gamma, beta, settings)
    assert torch.allclose(tape.out, out.detach(), **near)
    result = tape.backward(ga, keep=True)
    for name, value in zip(("x", "weight", "gamma_X", "beta_X"), grads, strict=True):
        if not (first and name == "x"):
            assert torch.allclose(getattr(result, name), value, **near), name
    assert torch.allclose(tape.tangent(x_t, weight_t), moved, **near)
    result_t = tape.tangent_backward(ga_t)
    for name, second, by in zip(("x", "weight", "gamma_X", "beta_X"), seconds, by_ga, strict=True):
        if not (first and name == "x"):
            value = getattr(result_t, name)
            value = value if name != "x" or result_t.x_2 is None else value + result_t.x_2
            assert torch.allclose(value, second + by, **near), name


@pytest.mark.parametrize("statistics", list(Statistics))
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("way", BY_HAND)
def test_hand_written_class_scores_equal_the_network_in_every_norm_mode(way, image, statistics):
    _, net, state, episodes = prepared(image, algo="maml++")
    for rows in state.running.values():
        rows.mul_(1.3).add_(0.1)
    fast = {name: weight.detach().expand(2, *weight.shape) for name, weight in state.slow.items()}
    along = 3 if statistics is Statistics.SUPPORT else 0
    logits = []
    for derivatives in (Autograd(net), WAYS[way](net)):
        norm = NormPass(state.frozen().norm, state.running, 1, statistics, along)
        ready = derivatives.prepare(episodes.query_x_TECHW, episodes.query_y_TE, along or None)
        logits.append(ready.logits(fast, norm))
    assert torch.allclose(*logits, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("engine", ["adjoint", "plain"])
@pytest.mark.parametrize("chunk", ["1", "2", "5"])
def test_results_do_not_depend_on_the_tasks_per_pass(engine, chunk):
    measured = []
    for task_chunk in ("auto", chunk):
        config, net, state, episodes = prepared(
            algo="maml++", da=False, meta_batch_size=5, engine=engine, task_chunk=task_chunk
        )
        measured.append(MetaStep(config, net, state).measure(episodes, 0, measure_all=True))
    assert_equal_measurements(measured[1], measured[0], state)


# What torch raises on a CUDA device and on a CPU, and Python anywhere.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no room"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_halves_the_tasks_per_pass(error):
    config, net, state, episodes = prepared(algo="maml++", da=False, meta_batch_size=5)
    expected = MetaStep(config, net, state).measure(episodes, 0, measure_all=True)
    step, chunks = MetaStep(config, net, state), []
    outer = step.outer

    def small_device(net, state, part, request):
        chunks.append(len(part.query_y_TE))
        if chunks[-1] > 2:
            raise error
        return outer(net, state, part, request)

    step.outer = small_device
    assert_equal_measurements(step.measure(episodes, 0, measure_all=True), expected, state)
    assert chunks == [5, 3, 2, 2, 1], "5 and 3 fail, then 2 at a time"
    step.measure(episodes, 0, measure_all=True)
    assert chunks[5:] == [2, 2, 1]


@pytest.mark.parametrize("chunk", ["auto", "3"])
def test_too_little_memory_for_the_smallest_chunk_is_an_error(chunk):
    config, net, state, episodes = prepared(algo="maml", meta_batch_size=3, task_chunk=chunk)
    step = MetaStep(config, net, state)

    def full_device(*args, **named):
        raise torch.OutOfMemoryError("no room")

    step.outer = full_device
    with pytest.raises(MamlctlError, match=r"cpu does not have enough memory for (1 task|3 tasks) per pass"):
        step.measure(episodes, 0, measure_all=False)


def test_an_error_other_than_a_lack_of_memory_is_not_retried():
    config, net, state, episodes = prepared(algo="maml", meta_batch_size=3)
    step, calls = MetaStep(config, net, state), []

    def broken(*args, **named):
        calls.append(args)
        raise RuntimeError("shapes differ")

    step.outer = broken
    with pytest.raises(RuntimeError, match="shapes differ"):
        step.measure(episodes, 0, measure_all=False)
    assert len(calls) == 1


def test_only_the_tapes_of_the_last_inner_steps_are_kept():
    """At most KEPT tapes are alive at once, so memory does not grow with the number of inner steps."""
    config, net, state, episodes = prepared(algo="maml++", da=False, inner_steps=3 * adjoint_module.KEPT)

    class Counting(Autograd):
        alive = most = count = 0

        def prepare(self, *args):
            return CountingSet(**vars(super().prepare(*args)))

    class CountingSet(AutogradSet):
        def gradient(self, *args, keep=False):
            Counting.count += 1
            Counting.alive += keep
            Counting.most = max(Counting.most, Counting.alive)
            gradient = super().gradient(*args, keep=keep)
            return replace(gradient, tape=CountingTape(gradient.tape)) if keep else gradient

    class CountingTape:
        def __init__(self, tape):
            self.tape = tape

        def product(self, *args):
            Counting.alive -= 1
            return self.tape.product(*args)

    measured_by(adjoint, config, net, state, episodes, False, derivatives=Counting(net))
    assert (Counting.most, Counting.alive) == (adjoint_module.KEPT, 0)
    again = 2 * adjoint_module.KEPT
    assert Counting.count == 2 * config.inner_steps + again, "support, query, and early support passes again"


def test_select_derivatives_depends_on_device_dtype_and_engine(monkeypatch):
    _, net, state, _ = prepared(algo="maml")
    like = state.slow["linear.bias"]
    assert isinstance(select_derivatives(net, like, "plain"), Autograd)
    chosen = select_derivatives(net, like)
    assert (chosen.make_block is c_block.native_block) == HAS_C
    monkeypatch.setattr(c_library, "library", lambda dtype: None)
    assert select_derivatives(net, like).make_block is TorchTape


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """Use an empty cache folder in `tmp_path` for compiled libraries."""
    monkeypatch.setattr(c_library.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(c_library, "_uncached", [])


def _pretend_to_compile(words):
    return Path(words[words.index("-o") + 1]).write_bytes(b"compiled") > 0


def _endless_file(path):
    with path.open("wb") as file:
        file.truncate(2**42)  # bytes; a sparse file, which takes none


@needs_c
@pytest.mark.usefixtures("empty_cache")
def test_a_missing_or_broken_compiler_is_not_an_error(monkeypatch, tmp_path):
    # The libraries are only loaded, so -O0 saves most of the compile time.
    monkeypatch.setattr(c_library, "OPTIONS", [word.replace("-O3", "-O0") for word in c_library.OPTIONS])
    fresh = c_library.library.__wrapped__
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        without.setenv("CC", "no-such-compiler")
        assert fresh(torch.float32) is None
    monkeypatch.setenv("CC", "cc -g0")
    assert fresh(torch.float32) is not None, "CC may contain options"
    (built,) = tmp_path.rglob("*.so")
    whole = built.read_bytes()
    for damaged in (b"damaged", whole[: len(whole) // 2], bytes(len(whole))):
        built.unlink()  # this process has mapped the file, so it must not be truncated
        built.write_bytes(damaged)
        assert fresh(torch.float32) is not None, "a damaged library is compiled again"
        assert [path.name for path in tmp_path.rglob("*.so")] == [built.name]
        assert built.read_bytes() == whole
    for put in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), _endless_file):
        built.unlink()
        put(built)
        assert fresh(torch.float32) is not None, "what is not a library is replaced, not read"
        assert built.is_file() and not built.is_symlink() and built.read_bytes() == whole
    assert c_library.compiled_at_every_start() is None
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(c_library, "TUNING", ("-march=native", "--no-such-option"))
    assert fresh(torch.float32) is not None, "cc is used instead, without the unknown option"
    monkeypatch.setattr(c_library.platformdirs, "user_cache_path", lambda name: Path("/proc/nowhere"))
    assert fresh(torch.float32) is not None, "without a cache"
    assert "/proc/nowhere/native cannot be written" in c_library.compiled_at_every_start()
    _, net, state, _ = prepared(algo="maml")
    assert "set XDG_CACHE_HOME" in slower_than_it_could_be(net, state.example_tensor, "adjoint")
    assert fresh(torch.int8) is None


@pytest.mark.parametrize(
    ("ratio", "words"), [(512.3, "512 times slower"), (1.57, "1.6 times slower"), (0.8, None)]
)
def test_bfloat16_without_instructions_is_announced_with_the_measured_ratio(monkeypatch, ratio, words):
    asked = []
    monkeypatch.setattr(selection, "times_slower", lambda dtype: asked.append(dtype) or ratio)
    for precision, lacks in (("float32", True), ("bf16", False)):
        monkeypatch.setattr(c_library, "lacks_bfloat16", lambda lacks=lacks: lacks)
        _, net, state, _ = prepared(algo="maml", precision=precision)
        assert slower_than_it_could_be(net, state.example_tensor, "adjoint") is None
    assert not asked, "nothing is measured without a need"
    monkeypatch.setattr(c_library, "lacks_bfloat16", lambda: True)
    notice = slower_than_it_could_be(net, state.example_tensor, "adjoint")
    assert asked == [torch.bfloat16]
    assert (words in notice and "avx512_bf16" in notice) if words else notice is None


def test_the_speed_of_a_type_is_measured_without_random_numbers():
    before = torch.get_rng_state()
    assert 0.01 < times_slower(torch.float64) < 1000
    assert torch.equal(torch.get_rng_state(), before)


@needs_c
@pytest.mark.usefixtures("empty_cache")
def test_a_compilation_is_announced_only_if_it_happens(monkeypatch):
    monkeypatch.setattr(c_library, "_load", lambda path: "a library")
    monkeypatch.setattr(c_library, "_succeeds", _pretend_to_compile)
    begun = []
    for _ in range(2):  # the second time, the library is in the cache
        with c_library.compilation(lambda: begun.append("compiling")):
            assert c_library.library.__wrapped__(torch.float32) == "a library"
            assert c_library.library.__wrapped__(torch.int8) is None
    assert begun == ["compiling"]
    c_library.library.__wrapped__(torch.float64)
    assert begun == ["compiling"], "outside of the block"


@pytest.mark.usefixtures("empty_cache")
def test_a_library_that_another_user_can_replace_is_neither_loaded_nor_written(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(c_library, "_load", lambda path: loaded.append(path) or "a library")
    monkeypatch.setattr(c_library, "_succeeds", _pretend_to_compile)
    fresh = c_library.library.__wrapped__
    fresh(torch.float32)
    (built,) = tmp_path.rglob("*.so")
    folder = built.parent
    assert folder.stat().st_mode & 0o777 == 0o700
    fresh(torch.float32)
    assert loaded[-1] == built and c_library.compiled_at_every_start() is None
    for shared in (built, folder, folder.parent):
        mode = shared.stat().st_mode
        shared.chmod(0o777)
        fresh(torch.float32)
        assert loaded[-1] != built
        if shared != built:
            assert not loaded[-1].is_relative_to(tmp_path)
            assert f"other users can change {folder}" in c_library.compiled_at_every_start()
        shared.chmod(mode)
    folder.parent.chmod(0o1777)  # as /tmp: only the owner of a file can replace it
    fresh(torch.float32)
    assert loaded[-1] == built


@pytest.mark.parametrize(
    ("owner", "mode", "unknown", "trusted"),
    [
        (65534, 0o40755, 65534, True),
        (65534, 0o40775, 65534, False),
        (65534, 0o40757, 65534, False),
        (1001, 0o40755, 65534, False),
        (65534, 0o40755, None, False),  # outside of namespaces, where this is the number of a user
    ],
)
def test_folders_of_unknown_owners_are_trusted_if_nobody_else_can_write(
    monkeypatch, tmp_path, owner, mode, unknown, trusted
):
    """In a user namespace root's folders above the cache have the number of an unknown owner."""
    real = Path.stat

    def stat(path, **options):
        status = list(real(path, **options))
        status[0], status[4] = (0o40700, 1000) if path == tmp_path else (mode, owner)
        return os.stat_result(status)

    monkeypatch.setattr(c_library, "_unknown_owner", lambda: unknown)
    monkeypatch.setattr(c_library.os, "geteuid", lambda: 1000)
    with monkeypatch.context() as inside:
        inside.setattr(Path, "stat", stat)
        found = c_library._is_private(tmp_path), c_library._is_private(tmp_path.parent)
    assert found == (trusted, False), "the cache itself must belong to this user"


@pytest.mark.parametrize(
    ("compiles", "reason"), [(False, "the C compiler fails in"), (True, "programs cannot be run from")]
)
@pytest.mark.usefixtures("empty_cache")
def test_the_reason_for_compiling_at_every_start_is_the_true_one(monkeypatch, tmp_path, compiles, reason):
    def succeeds(words):
        return compiles or not Path(words[words.index("-o") + 1]).is_relative_to(tmp_path)

    monkeypatch.setattr(c_library, "_succeeds", succeeds)
    monkeypatch.setattr(
        c_library, "_load", lambda path: None if path.is_relative_to(tmp_path) else "a library"
    )
    assert c_library.library.__wrapped__(torch.float32) == "a library"
    assert f"because {reason} {tmp_path}" in c_library.compiled_at_every_start()


@pytest.mark.usefixtures("empty_cache")
def test_a_folder_that_another_process_removes_does_not_prevent_caching(monkeypatch, tmp_path):
    monkeypatch.setattr(c_library, "_load", lambda path: "a library")
    monkeypatch.setattr(c_library, "_succeeds", _pretend_to_compile)
    folder = tmp_path / "mamlctl" / "native"
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700)
    (folder / "tmp-gone").symlink_to("nothing")  # listed, but without a status, like a folder just removed
    assert c_library.library.__wrapped__(torch.float32) == "a library"
    assert c_library.compiled_at_every_start() is None
    assert len(list(folder.glob("*.so"))) == 1


@pytest.mark.parametrize("ink", [1, 0])
@pytest.mark.parametrize("way", BY_HAND)
def test_float32_stays_near_float64_on_characters(way, ink, glyphs_root):
    """On mostly blank images the variance of the first layer is a small difference, sensitive to rounding.

    Error of the meta-gradient of 3 inner steps, relative to its norm in float64. Measured: 5e-7 to 2e-6 (12
    cases). A pooling window that selects another place because of rounding costs about 1e-3. Patch moments in
    float32 would give 2e-2.
    """
    grads = {}
    for precision in ("float64", "float32"):
        named = {"algo": "maml++", "da": False, "dataset": "glyphs", "filters": 32, "inner_steps": 3}
        config = small_config(**named, inner_lr=0.01, precision=precision, ink=ink)
        config = fill_defaults(replace(config, data_root=str(glyphs_root)))
        streams, source = open_streams(
            config,
            ("train",),
            Placement(CPU, getattr(torch, precision)),
            offline=True,
            on_event=lambda event: None,
        )
        net, state = build(config, source.example_shape, CPU)
        for tensor in state.learnable().values():
            tensor.requires_grad_()
        derivatives = Autograd(net) if precision == "float64" else WAYS[way](net)
        tasks = streams["train"].episodes(0, 2)
        result = measured_by(adjoint, config, net, state, tasks, False, derivatives=derivatives)
        grads[precision] = torch.cat([grad.double().flatten() for grad in result.grads.values()])
    error = (grads["float32"] - grads["float64"]).norm() / grads["float64"].norm()
    assert float(error) < 5e-3


def test_another_block_is_used_only_if_it_is_correct():
    """Triton's kernels are selected in this way on a CUDA device."""

    class Wrong(TorchTape):
        def tangent(self, *args):
            return 1.2 * super().tangent(*args)

    class WrongFirst(TorchTape):
        def backward(self, ga, *, keep):
            return super().backward(1.2 * ga if self.settings.first else ga, keep=keep)

    class Broken(TorchTape):
        def backward(self, *args, **named):
            raise RuntimeError("no kernel image is available")

    class Good(TorchTape):
        pass

    class WrongHead(TorchHead):
        def tangent(self, *args):
            return super().tangent(*(1.2 * part for part in args))

    like = torch.empty(0)
    assert not agree(PLAIN, (*PLAIN[:2], WrongHead), like, None)
    for other in (Good, Wrong, WrongFirst, Broken):
        assert agree(PLAIN, (other, *PLAIN[1:]), like, None) == (other is Good)
    if HAS_C:
        assert agree(PLAIN, (c_block.native_block, c_block.prepare, TorchHead), like, None)


@needs_c
@pytest.mark.parametrize("first", [False, True], ids=["inner", "first"])
def test_bfloat16_blocks_in_c_agree_with_torch(first):
    """Compare every pass; results are stored with 8 bits, so that rounding is about 1 %.

    In the first block batch norm's gradient is a difference of such sums: 5 % measured.
    """
    generator, bf16 = torch.Generator().manual_seed(5), torch.bfloat16

    def normal(*size):
        values = torch.randn(*size, generator=generator)
        return values.contiguous(memory_format=torch.channels_last) if len(size) == 4 else values

    tasks, filters, channels = 2, 20, 1 if first else 6
    x, x_t = (normal(6, tasks * channels, 9, 8).to(bf16).float() for _ in range(2))
    ga, ga_t, other = (normal(6, tasks * filters, 4, 4).to(bf16) for _ in range(3))
    weight, weight_t = (normal(tasks * filters, channels, 3, 3) for _ in range(2))
    gamma, beta = normal(tasks * filters), normal(tasks * filters)
    results = []
    for make in (TorchTape, c_block.native_block):
        in_c = make is c_block.native_block
        settings = BlockSettings(
            groups=tasks,
            # The first block in C multiplies in float32 even with compute=bfloat16.
            compute=bf16 if in_c or not first else None,
            first=first,
            planes=c_block.prepare(x, tasks, None) if in_c and first else None,
        )
        stored = bf16 if in_c else torch.float32
        tape = make(x if first else x.to(stored), weight, gamma, beta, settings)
        one = tape.backward(ga.to(stored), keep=True)
        moved = tape.tangent(None if first else x_t.to(stored), weight_t)
        two = tape.tangent_backward(ga_t.to(stored), other.to(stored))
        result = {"out": tape.out, "moved": moved}
        result |= {"weight": one.weight, "gamma": one.gamma_X, "beta": one.beta_X}
        result |= {"weight_t": two.weight, "gamma_t": two.gamma_X, "beta_t": two.beta_X}
        if not first:
            result |= {"x": one.x, "x_t": two.x if two.x_2 is None else two.x.float() + two.x_2.float()}
        results.append({name: value.double() for name, value in result.items()})
    for name, expected in results[0].items():
        error = (results[1][name] - expected).norm() / expected.norm()
        assert float(error) < (0.08 if first else 0.02), (name, float(error))


@pytest.mark.parametrize("way", [BY_HAND[1], pytest.param("triton", marks=needs_triton)])
def test_kernels_handle_one_task_with_one_channel(way):
    """With one channel torch may return a convolution in the other memory layout."""
    generator = torch.Generator().manual_seed(4)
    x, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((3, 1, 6, 6), (5, 1, 3, 3))
    )
    gamma, beta = torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    settings = BlockSettings(groups=1, compute=None, first=False)
    if way == "c":
        tape = c_block.native_block(x, weight, gamma, beta, settings)
    else:
        tape = triton_block.TritonBlocks.on(CPU)(x, weight, gamma, beta, settings)
    sure = TorchTape(x, weight, gamma, beta, settings)
    ga = torch.randn(sure.out.shape, generator=generator, dtype=torch.float64)
    ga = ga.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(tape.out, sure.out, atol=1e-6)
    assert torch.allclose(tape.backward(ga, keep=True).weight, sure.backward(ga, keep=True).weight, atol=1e-6)
    assert torch.allclose(tape.tangent(x, weight), sure.tangent(x, weight), atol=1e-6)
    pair = (each.tangent_backward(ga).weight for each in (tape, sure))
    assert torch.allclose(*pair, atol=1e-5)


@needs_c
def test_first_block_stays_precise_on_constant_images():
    """Here the variance of c comes from the image's border only; sums in float32 would lose it."""
    x = torch.full((4, 1, 12, 12), 0.5).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(3, 1, 3, 3)
    weight[:, 0, 1, 1] = torch.tensor([3.0, 30.0, 0.1])
    weight[:, 0, 0, 0] = 0.01
    settings = BlockSettings(groups=1, compute=None, first=True)
    in_c = replace(settings, planes=c_block.prepare(x, 1, None))
    tape = c_block.native_block(x, weight, torch.ones(3), torch.zeros(3), in_c)
    sure = TorchTape(x.double(), weight.double(), torch.ones(3).double(), torch.zeros(3).double(), settings)
    assert bool(tape.out.isfinite().all())
    assert torch.allclose(tape.seen[1].double(), sure.seen[1], rtol=1e-4, atol=1e-9)

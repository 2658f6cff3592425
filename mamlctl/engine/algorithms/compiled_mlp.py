"""MAML's meta-gradient for curves in C (kernels/c/mlp.c), by the adjoint method.

On the network for curves a meta-step by torch's operations takes milliseconds, of which its arithmetic is a
few per cent. Here one call of a C function computes the meta-gradient of all tasks.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, unrolled
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.kernels.c_library import library
from mamlctl.engine.nets.base import REGRESSION, SLOPES, Net
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.optimizers import EPS, Adam

# Weights x examples x tasks for which one more thread is worthwhile. On curves a meta-step takes 0.2 ms, and
# to wake a second thread takes almost as long while another program runs on its core.
WORK_OF_THREAD = 2_000_000

Pointers = ctypes.Array[ctypes.c_void_p]


class Settings(ctypes.Structure):
    """The struct `mlp` of c/mlp.c."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("tasks", "layers", "support", "query", "steps", "threads")),
        *((name, ctypes.c_int) for name in ("first_order", "learns_rates", "rate_rows", "rate_per_weight")),
        ("leak", ctypes.c_double),
        ("widths", ctypes.POINTER(ctypes.c_int)),
        ("weights", ctypes.POINTER(ctypes.c_double)),
        ("measured", ctypes.POINTER(ctypes.c_int)),
    ]


class _Shape(NamedTuple):
    """Everything that determines the sizes and the order of the arithmetic of a meta-step."""

    net: Mlp
    dtype: torch.dtype
    tasks: int
    support: int  # examples
    query: int
    first_order: bool
    weights: tuple[float, ...]  # of the query losses in the meta-loss, one per inner step
    measure_all: bool
    learns_rates: bool
    rate_rows: int
    rate_per_weight: bool
    threads: int

    @property
    def measured(self) -> list[bool]:
        """Whether the query loss after 0, 1, ... inner steps is measured."""
        return [self.measure_all or weight != 0 for weight in (0.0, *self.weights)]


@lru_cache(maxsize=8)
def _prepared(shape: _Shape) -> tuple[Settings, Tensor, Tensor]:
    """The settings for C, its working memory, and the tensor of losses [T, I + I + 1], which it fills."""
    net, steps = shape.net, len(shape.weights)
    widths = (math.prod(net.input_shape), *net.hidden, net.outputs)
    settings = Settings(
        *(shape.tasks, len(widths) - 1, shape.support, shape.query, steps),
        *(shape.threads, shape.first_order, shape.learns_rates, shape.rate_rows, shape.rate_per_weight),
        SLOPES[net.activation],
        (ctypes.c_int * len(widths))(*widths),
        (ctypes.c_double * steps)(*(weight / shape.tasks for weight in shape.weights)),
        (ctypes.c_int * (steps + 1))(*shape.measured),
    )
    functions = library(shape.dtype)
    assert functions is not None
    functions.mlp_memory.restype = ctypes.c_long
    memory = torch.empty(functions.mlp_memory(ctypes.byref(settings)), dtype=shape.dtype)
    return settings, memory, torch.zeros(shape.tasks, 2 * steps + 1, dtype=torch.float64)


def available(net: Net, like: Tensor) -> bool:
    """Whether a network's meta-gradient can be computed in C.

    Args:
        net: the network.
        like: a tensor of the device and dtype to use.
    """
    of_curves = isinstance(net, Mlp) and net.objective == REGRESSION
    return of_curves and like.device.type == "cpu" and library(like.dtype) is not None


@dataclass(frozen=True)
class _Call:
    """The arguments that one meta-step and many have in common; keeps the memory that they point to."""

    functions: ctypes.CDLL
    shape: _Shape
    grads: dict[str, Tensor]  # output
    arguments: tuple[Any, ...]  # settings, slow weights, rates, sets, gradients of slow weights and of rates
    scratch: tuple[ctypes.c_void_p, ctypes.c_void_p]  # losses and memory
    kept: tuple[Tensor, ...]

    @classmethod
    def of(cls, net: Mlp, state: MetaState, episodes: Episodes, request: MetaStepRequest, tasks: int) -> Self:
        """Prepare a call; arguments as in `Outer`, and the number of tasks of a meta-step."""
        some_rate = next(iter(state.rates.values()))
        shape = _Shape(
            net,
            some_rate.dtype,
            tasks,
            episodes.support_y_TE.shape[1],
            episodes.query_y_TE.shape[1],
            request.first_order,
            tuple(float(weight) for weight in request.msl_weights),
            request.measure_all,
            state.rates_learnt,
            len(some_rate),
            some_rate.dim() > 1,
            _threads(state, episodes, tasks),
        )
        settings, memory, losses_TI = _prepared(shape)
        functions = library(shape.dtype)
        assert functions is not None
        # C computes the gradients of frozen tensors too.
        learnt = state.slow | state.learnable()
        grads = {name: torch.empty_like(tensor) for name, tensor in learnt.items()}
        sets = tuple(tensor.contiguous() for tensor in episodes.sets)
        arguments = (
            ctypes.byref(settings),
            _pointers(state.slow.values()),
            _pointers(state.rates.get(name) for name in state.slow),
            _pointers(sets),
            _pointers(grads[name] for name in state.slow),
            _pointers(grads.get(RATE + name) for name in state.slow),
        )
        scratch = ctypes.c_void_p(losses_TI.data_ptr()), ctypes.c_void_p(memory.data_ptr())
        return cls(functions, shape, grads, arguments, scratch, sets)

    def result(self, means_I: Tensor) -> MetaStepResult:
        """Return the result from the means that C computes: losses of support and query sets, meta-loss."""
        steps = len(self.shape.weights)
        query = {step: means_I[steps + step] for step, wanted in enumerate(self.shape.measured) if wanted}
        return MetaStepResult(self.grads, means_I[-1], means_I[:steps], query, query, [])


def compiled(net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
    """Compute the meta-gradient of `meta_gradient.unrolled` in C; without a C compiler or on CUDA, by it.

    Arguments and result as in `Outer`.
    """
    if not available(net, episodes.support_x_TECHW):
        return unrolled(net, state, episodes, request)
    assert isinstance(net, Mlp)
    call = _Call.of(net, state, episodes, request, len(episodes.support_y_TE))
    means_I = torch.empty(2 * request.inner_steps + 2, dtype=torch.float64)
    call.functions.mlp_meta_gradient(*call.arguments, ctypes.c_void_p(means_I.data_ptr()), *call.scratch)
    return call.result(means_I)


def compiled_steps(
    net: Mlp,
    state: MetaState,
    episodes: Episodes,
    request: MetaStepRequest,
    optimizer: CompiledAdam,
    meta_lrs: Sequence[float],
) -> list[MetaStepResult]:
    """Take many meta-steps in one call of a C function, with the results of one after another.

    Args:
        net, state, request: as in `Outer`; without measurements beyond the meta-loss.
        episodes: the tasks of all meta-steps, in order.
        optimizer: the optimiser of the state's learnable tensors.
        meta_lrs: the meta learning rate of each meta-step.

    Returns:
        The measurements of each meta-step, whose gradients are those of the last one. There are fewer than
        `meta_lrs` if a loss or gradient is not finite: the meta-step with it was not taken.
    """
    count = len(meta_lrs)
    call = _Call.of(net, state, episodes, request, len(episodes.support_y_TE) // count)
    settings, *tensors = call.arguments
    means_SI = torch.empty(count, 2 * request.inner_steps + 2, dtype=torch.float64)
    done = call.functions.mlp_train(
        settings,
        ctypes.byref(optimizer.settings),
        count,
        (ctypes.c_double * count)(*meta_lrs),
        *tensors,
        _pointers(call.grads[name] for name in optimizer.learnable),
        ctypes.c_void_p(means_SI.data_ptr()),
        *call.scratch,
    )
    return [call.result(means_I) for means_I in means_SI[:done].unbind()]


def _threads(state: MetaState, episodes: Episodes, tasks: int) -> int:
    """The number of threads to use, which has no influence on the results."""
    examples = episodes.support_y_TE.shape[1] + episodes.query_y_TE.shape[1]
    work = sum(weight.numel() for weight in state.slow.values()) * examples * tasks
    return max(1, min(torch.get_num_threads(), tasks, work // WORK_OF_THREAD))


def _pointers(tensors: Iterable[Tensor | None]) -> Pointers:
    """An array of pointers to contiguous tensors; null for None."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


class AdamSettings(ctypes.Structure):
    """The struct `adam` of c/mlp.c."""

    _fields_ = [
        ("tensors", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("b1", "b2", "eps")),
        ("counts", ctypes.POINTER(ctypes.c_long)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("weights", "first", "second", "steps")),
    ]


class CompiledAdam(Adam):
    """Adam in C, for tensors so small that the time of torch's operations is their number."""

    def __init__(self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(learnable, lr, betas)
        sizes = [tensor.numel() for tensor in learnable.values()]
        # All tensors are updated in place, so their addresses stay the same.
        places = (_pointers(part.values()) for part in (learnable, self.first, self.second, self.steps))
        counts = (ctypes.c_long * len(sizes))(*sizes)
        self.settings = AdamSettings(len(sizes), *betas, EPS, counts, *places)

    def step(self, grads: Mapping[str, Tensor]) -> None:
        functions = library(next(iter(self.first.values())).dtype)
        assert functions is not None
        ordered = [grads[name].contiguous() for name in self.learnable]
        functions.adam_step(ctypes.byref(self.settings), ctypes.c_double(self.lr_now()), _pointers(ordered))


def adam(learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> Adam:
    """Return Adam in C if the tensors are on a CPU with a C compiler; arguments as in `Adam`."""
    like = next(iter(learnable.values()))
    in_c = like.device.type == "cpu" and library(like.dtype) is not None
    return (CompiledAdam if in_c else Adam)(learnable, lr, betas)

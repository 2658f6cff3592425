"""MAML's meta-gradient for curves in C (kernels/c/mlp.c), by the adjoint method.

On the network for curves a meta-step by torch's operations takes milliseconds, of which its arithmetic is a
few per cent. Here one call of a C function computes the meta-gradient of all tasks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult, unrolled
from mamlctl.engine.inner_loop import RATE, MetaState
from mamlctl.engine.kernels.c_library import library
from mamlctl.engine.nets.base import REGRESSION, SLOPES, Net
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.optimizers import EPS, Adam

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
    widths = (net.input_shape[0], *net.hidden, net.outputs)
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
    of_curves = isinstance(net, Mlp) and net.objective is REGRESSION
    return of_curves and like.device.type == "cpu" and library(like.dtype) is not None


def compiled(net: Net, state: MetaState, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
    """Compute the meta-gradient of `meta_gradient.unrolled` in C; without a C compiler or on CUDA, by it.

    Arguments and result as in `Outer`.
    """
    if not available(net, episodes.support_x_TECHW):
        return unrolled(net, state, episodes, request)
    assert isinstance(net, Mlp)
    some_rate = next(iter(state.rates.values()))
    shape = _Shape(
        net,
        some_rate.dtype,
        len(episodes.support_y_TE),
        episodes.support_y_TE.shape[1],
        episodes.query_y_TE.shape[1],
        request.first_order,
        tuple(float(weight) for weight in request.msl_weights),
        request.measure_all,
        state.rates_learnt,
        len(some_rate),
        some_rate.dim() > 1,
        torch.get_num_threads(),
    )
    settings, memory, losses_TI = _prepared(shape)
    slow, steps = state.slow, request.inner_steps
    grads = {name: torch.empty_like(tensor) for name, tensor in state.learnable().items()}
    means_I = torch.empty(2 * steps + 2, dtype=torch.float64)
    functions = library(shape.dtype)
    assert functions is not None
    functions.mlp_meta_gradient(
        ctypes.byref(settings),
        _pointers(slow.values()),
        _pointers(state.rates.get(name) for name in slow),
        _pointers(tensor.contiguous() for tensor in episodes.sets),
        _pointers(grads[name] for name in slow),
        _pointers(grads.get(RATE + name) for name in slow),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (means_I, losses_TI, memory)),
    )
    query = {step: means_I[steps + step] for step, wanted in enumerate(shape.measured) if wanted}
    return MetaStepResult(grads, means_I[-1], means_I[:steps], query, query, [])


def _pointers(tensors: Iterable[Tensor | None]) -> Pointers:
    """An array of pointers to contiguous tensors; null for None."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


class CompiledAdam(Adam):
    """Adam in C, for tensors so small that the time of torch's operations is their number."""

    def __init__(self, learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(learnable, lr, betas)
        sizes = [tensor.numel() for tensor in learnable.values()]
        # The tensors are updated in place, so their addresses stay the same.
        self._counts = (ctypes.c_long * len(sizes))(*sizes)
        self._places = [_pointers(part.values()) for part in (learnable, self.first, self.second, self.steps)]

    def step(self, grads: Mapping[str, Tensor]) -> None:
        functions = library(next(iter(self.first.values())).dtype)
        assert functions is not None
        weights, first, second, steps = self._places
        rule = (ctypes.c_double(value) for value in (*self.betas, self.lr_now(), EPS))
        ordered = _pointers(grads[name] for name in self.learnable)
        functions.adam_step(len(steps), self._counts, *rule, weights, ordered, first, second, steps)


def adam(learnable: Mapping[str, Tensor], lr: float, betas: tuple[float, float]) -> Adam:
    """Return Adam in C if the tensors are on a CPU with a C compiler; arguments as in `Adam`."""
    like = next(iter(learnable.values()))
    in_c = like.device.type == "cpu" and library(like.dtype) is not None
    return (CompiledAdam if in_c else Adam)(learnable, lr, betas)

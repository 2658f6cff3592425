"""Any torch.nn.Module as a network of mamlctl.

The module becomes a function of its parameters (module_template.py). With one set of parameters per task, all
tasks are computed in one pass (torch.func.vmap) where that is exact, and otherwise one by one.

A module that draws random numbers in training, such as dropout, is in training mode only in the passes of a
meta-step. Each pass of a task starts from a seed that depends on the task, the inner step and the set, so
that a resumed run draws the same numbers. In evaluation the module is in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import vmap

from mamlctl.core.user_code.importing import UserCode
from mamlctl.engine.nets.base import CLASSIFICATION, HEAD, Objective
from mamlctl.engine.nets.batch_norm import NormPass, Params, init_params, init_running
from mamlctl.engine.nets.module_template import Template

Factory = Callable[[tuple[int, ...], int], nn.Module]  # input shape, number of outputs -> module
MIXED = 0x9E3779B97F4A7C15  # an odd number, by which seeds of neighbouring steps differ in many bits


@dataclass(frozen=True)
class ModulePlan:
    """How a module is made, and how it is computed."""

    make: Factory
    one_pass: bool = True  # compute all tasks in one pass, under vmap
    random: bool = False  # whether it draws random numbers in training


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for the block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class ModuleNet:
    """A network whose module a factory makes."""

    plan: ModulePlan
    input_shape: tuple[int, ...]
    outputs: int
    objective: Objective = CLASSIFICATION
    head: str | None = None  # the path of the head in the module; None for the last linear layer

    compute = None
    places = 1

    @cached_property
    def template(self) -> Template:
        """The module. Raises SettingsError if it cannot be used."""
        return self.made(0)

    def original(self, seed: int) -> nn.Module:
        """Make a new module as it is, with the random numbers of a seed."""
        with _seeded(seed):
            return self.plan.make(self.input_shape, self.outputs)

    @property
    def code(self) -> UserCode | None:
        """The user's code that makes the module; None for a library."""
        return self.plan.make if isinstance(self.plan.make, UserCode) else None

    def made(self, seed: int) -> Template:
        """Make a new module, with the random numbers of a seed, and take it over."""
        code = self.code
        return Template(self.original(seed), self.head, None if code is None else code.running)

    @property
    def norm_layers(self) -> dict[str, int]:
        return {name: layer.channels for name, layer in self.template.norms.items()}

    @cached_property
    def largest(self) -> int:
        """The number of elements per example in the largest output of a layer."""
        template, sizes = self.template, [math.prod(self.input_shape)]

        def measure(layer: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                sizes.append(output.numel() // examples)

        examples = 2  # since a layer may refuse a single one
        handles = [layer.register_forward_hook(measure) for layer in template.module.modules()]
        weights = template.parameters(torch.get_default_dtype())
        like = torch.empty(())
        norm = NormPass(init_params(self.norm_layers, 1, like), init_running(self.norm_layers, 1, like), 0)
        try:
            with torch.no_grad():
                template.run(weights, torch.zeros(examples, *self.input_shape), norm)
        finally:
            for handle in handles:
                handle.remove()
        return max(sizes)

    def init(self, generator: torch.Generator, dtype: torch.dtype) -> Params:
        """Draw the initial weights, as the factory does after torch.manual_seed."""
        return self.made(generator.initial_seed()).parameters(dtype)

    def start_of_norms(self, seed: int, norm: Params, running: Params) -> None:
        """Copy the module's own batch-norm weights and running statistics into all rows.

        Args:
            seed: of the initial weights.
            norm: the weights and biases _RC.
            running: the running statistics _RC.
        """
        template = self.made(seed)
        for start, rows in ((template.norm_start, norm), (template.running, running)):
            for name, values in start.items():
                rows[name].copy_(values.expand_as(rows[name]))

    def features(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        if HEAD[0] not in fast:  # the head runs with any weights: its outputs are not used
            head = self.template.module.get_submodule(self.template.head).state_dict()
            like = {name: head[name.rpartition(".")[2]].to(x.device, x.dtype) for name in HEAD}
            fast = {**fast, **{name: part.expand(len(x), *part.shape) for name, part in like.items()}}
        return self._pass(fast, x, norm)[1]

    def __call__(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> Tensor:
        return self._pass(fast, x, norm)[0]

    def _pass(self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass) -> tuple[Tensor, Tensor]:
        """Compute the outputs _TEN and the features _TEF of all tasks."""
        template, tasks = self.template, x.shape[0]  # the factory must not run under vmap
        if self.plan.one_pass and tasks > 1:
            # Under vmap for two tasks or more: for a single one it only costs time.
            outputs, features, seen = vmap(
                lambda weights, x_E: template.run(weights, x_E, norm), randomness="error"
            )(dict(fast), x)
        else:
            parts = [
                template.run(
                    {name: weight[task] for name, weight in fast.items()},
                    x[task],
                    norm,
                    seed=self._seed(norm, task),
                )
                for task in range(tasks)
            ]
            outputs = torch.stack([part[0] for part in parts])
            features = torch.stack([part[1] for part in parts])
            seen = {
                name: (
                    torch.stack([part[2][name][0] for part in parts]),
                    torch.stack([part[2][name][1] for part in parts]),
                )
                for name in parts[0][2]
            }
        for name, (mean_T1C, var_T1C) in seen.items():
            norm.seen[name] = mean_T1C.squeeze(1), var_T1C.squeeze(1)
        return outputs, features

    def _seed(self, norm: NormPass, task: int) -> int | None:
        """The seed of a task's pass; None outside of training, and for a module without random numbers."""
        if not self.plan.random or norm.keys_T is None:
            return None
        return (int(norm.keys_T[task]) ^ (norm.step * MIXED)) % 2**63

"""Checks of a module before training: what cannot work is refused, and vmap is tried.

All checks run in float64 on a few random examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from mamlctl.core.errors import SettingsError, is_out_of_memory
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, unrolled
from mamlctl.engine.inner_loop import MetaState, expanded
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.nets.batch_norm import NormPass, init_params, init_running
from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan
from mamlctl.engine.nets.module_template import unusable

TASKS, EXAMPLES, STEPS = 2, 4, 1  # the least that has second-order terms: large modules are slow in float64
# Largest relative difference between the meta-gradients of one pass and of a loop: both are exact up to
# rounding in float64.
SAME = 1e-9
SEED = 1  # of random numbers in training mode
CHANGES = "gives other outputs when it is called again, so it keeps state"


def checked(net: ModuleNet) -> tuple[ModulePlan, str]:
    """Check a module, and choose between one pass for all tasks and a loop.

    Returns:
        How to compute it, and why it computes tasks one by one; "" if it computes them in one pass.

    Raises:
        SettingsError: the module cannot be used; the message names the layer.
    """
    _check_initial_weights(net)
    state, episodes = learner(net)
    task = _OneTask(net, state, episodes.support_x_TECHW[0])
    if name := task.draws(None):
        hint = "use a layer that draws only in training mode, such as nn.Dropout"
        raise unusable(f"{name} draws random numbers in evaluation too", hint)
    task.check_state(None)
    task.check_outputs()
    loop = replace(net, plan=replace(net.plan, one_pass=False))
    with net.template.guard():  # since backward passes may call the user's code too
        task.check_second_derivatives(episodes.support_y_TE[:1])
        try:
            expected = _meta_gradient(loop)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise unusable(f"its second-order meta-gradient fails: {_first_line(error)}") from error
    if not all(bool(grad.isfinite().all()) for grad in expected):
        raise unusable("its second-order meta-gradient is not finite on random examples")
    if name := task.draws(SEED):
        task.check_state(SEED)
        return replace(loop.plan, random=True), f"{name} draws random numbers"
    one_pass = replace(net.plan, one_pass=True)
    try:
        found = _meta_gradient(replace(net, plan=one_pass))
        found.append(_outputs(replace(net, plan=one_pass)))
    except (RuntimeError, SettingsError) as error:
        return loop.plan, f"vmap does not support it: {_first_line(error)}"
    # Compared with the norm of all, because the gradient of some tensors is 0 up to rounding.
    scale = float(torch.cat([grad.flatten() for grad in expected]).norm())
    expected.append(_outputs(loop))
    if any(float((a - b).norm()) > SAME * scale for a, b in zip(found, expected, strict=True)):
        return loop.plan, "its meta-gradient under vmap differs"
    return one_pass, ""


def _check_initial_weights(net: ModuleNet) -> None:
    """Raise SettingsError unless each call makes a new module, whose weights torch's seed decides."""
    first, second = (net.made(SEED) for _ in range(2))
    known = {id(weight) for weight in first.module.parameters()}
    if kept := [path for path, weight in second.module.named_parameters() if id(weight) in known]:
        hint = "make all layers in the function"
        raise unusable(f"'{kept[0]}' is the same tensor when the module is made again", hint)
    weights = second.parameters(torch.float64)
    pairs = first.parameters(torch.float64).items()
    if other := [name for name, weight in pairs if not torch.equal(weight, weights[name])]:
        hint = "draw initial weights with torch, which mamlctl seeds"
        raise unusable(f"'{other[0]}' gets other initial weights when the module is made again", hint)


def _first_line(error: Exception) -> str:
    return str(error.__cause__ or error).strip().partition("\n")[0]


class _OneTask:
    """Passes of one task's examples through a module."""

    def __init__(self, net: ModuleNet, state: MetaState, x_ECHW: Tensor) -> None:
        self.net, self.state, self.x_ECHW = net, state, x_ECHW
        self.template = net.template
        self.weights = {name: weight.detach().requires_grad_() for name, weight in state.slow.items()}

    def run(self, seed: int | None = None) -> tuple[Tensor, Tensor, Mapping[str, object]]:
        """The outputs, the features, and the statistics of batch norm."""
        norm = NormPass(self.state.norm, self.state.running, 0)
        return self.template.run(self.weights, self.x_ECHW, norm, seed=seed)

    def recorded(self, seed: int | None = None) -> dict[str, tuple[tuple[object, ...], object, bool]]:
        """The inputs and the output of each layer in one pass, and whether it drew random numbers."""
        before: dict[str, Tensor] = {}
        found: dict[str, tuple[tuple[object, ...], object, bool]] = {}

        def start(name: str, layer: nn.Module, inputs: tuple[object, ...]) -> None:
            before[name] = torch.get_rng_state()

        def end(name: str, layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            found[name] = inputs, output, not torch.equal(before[name], torch.get_rng_state())

        handles = []
        for name, layer in self.template.module.named_modules():
            handles.append(layer.register_forward_pre_hook(partial(start, name)))
            handles.append(layer.register_forward_hook(partial(end, name)))
        try:
            self.run(seed)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def draws(self, seed: int | None) -> str:
        """The first, innermost layer that draws random numbers; "" if none does.

        `seed` is that of a pass in training mode; None for evaluation mode.
        """
        with torch.random.fork_rng(devices=[]):
            found = self.recorded(seed)
        # Layers are recorded when they end, so inner ones come before those that contain them.
        return next((self.words(name) for name, (*_, drew) in found.items() if drew), "")

    def words(self, name: str) -> str:
        """A layer's name and class."""
        kind = type(self.template.module.get_submodule(name)).__name__
        return f"'{name}' ({kind})" if name else f"the module itself ({kind})"

    def check_state(self, seed: int | None) -> None:
        """Raise SettingsError unless a pass changes nothing; `seed` as in `draws`."""
        template = self.template
        # In the dtype of the examples, so that a pass gets these tensors and not copies of them.
        kept, like = template.buffers, self.x_ECHW
        template.buffers = {
            name: part.to(like.dtype if part.is_floating_point() else part.dtype, copy=True)
            for name, part in kept.items()
        }
        first, second = self.recorded(seed), self.recorded(seed)
        passed, template.buffers = template.buffers, kept
        for name, part in passed.items():
            if not torch.equal(part, kept[name].to(part.dtype)):
                layer = self.words(name.rpartition(".")[0])
                raise unusable(f"{layer} changes its buffers in a pass, which only batch norm may do")
        for name, (inputs, output, _) in first.items():
            again = second[name]
            if _same(inputs, again[0]) and not _same(output, again[1]):
                raise unusable(f"{self.words(name)} {CHANGES}")

    def check_outputs(self) -> None:
        """Raise SettingsError unless one pass returns the outputs of the head."""
        template, shape = self.template, (EXAMPLES, self.net.outputs)
        outputs_EN, features_EF, seen = self.run()
        if outputs_EN.shape != shape:
            raise unusable(f"its outputs have the shape {tuple(outputs_EN.shape)}, not {shape}")
        weight, bias = (self.weights[name] for name in HEAD)
        of_head = features_EF @ weight.T + bias
        if of_head.shape != shape or not torch.allclose(of_head, outputs_EN, rtol=1e-9, atol=1e-9):
            hint = f"return the outputs of '{template.head}' as they are, or name another layer with --head"
            raise unusable(f"its outputs are not those of its head '{template.head}'", hint)
        if unused := template.norms.keys() - seen.keys():
            raise unusable(f"'{min(unused)}' is not used in a pass: remove it")

    def check_second_derivatives(self, y_1E: Tensor) -> None:
        """Raise SettingsError unless the loss depends on all weights and can be differentiated twice."""
        norms = {name: rows.detach().requires_grad_() for name, rows in self.state.norm.items()}
        norm = NormPass(norms, self.state.running, 0)
        outputs_EN, *_ = self.template.run(self.weights, self.x_ECHW, norm)
        loss = self.net.objective.loss(outputs_EN[None], y_1E).sum()
        grads = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True, retain_graph=True)
        if unused := [name for name, grad in zip(self.weights, grads, strict=True) if grad is None]:
            own = self.template.paths[unused[0]]
            raise unusable(f"its outputs do not depend on its parameter '{own}': remove it")
        found = self.recorded()
        try:
            _differentiate_twice([loss], [*self.weights.values(), *norms.values()])
        except RuntimeError as error:
            for name, (inputs, *_) in found.items():  # inner layers first
                if name and _fails_alone(self.template.module.get_submodule(name), inputs):
                    raise unusable(f"{self.words(name)} has no second derivative") from error
            raise unusable(f"it has no second derivative: {_first_line(error)}") from error


def _same(one: object, other: object) -> bool:
    """Whether two inputs or outputs of a layer are equal."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other)


def _differentiate_twice(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Differentiate twice. Raises RuntimeError if that is not possible."""
    # Directions that require gradients, as they do inside a network: some errors are raised only then.
    directions = [torch.ones_like(output, requires_grad=True) for output in outputs]
    grads = torch.autograd.grad(outputs, inputs, directions, create_graph=True, materialize_grads=True)
    if differentiable := [grad for grad in grads if grad.requires_grad]:
        total = torch.stack([grad.square().sum() for grad in differentiable]).sum()
        # Not for chosen inputs, which would skip the node that raises the error.
        torch.autograd.backward(total)


def _fails_alone(layer: nn.Module, inputs: tuple[object, ...]) -> bool:
    """Whether a layer alone has no second derivative."""
    given = [
        part.detach().requires_grad_(part.is_floating_point()) if isinstance(part, Tensor) else part
        for part in inputs
    ]
    leaves = [part for part in given if isinstance(part, Tensor) and part.requires_grad]
    named = {name: weight.detach().double().requires_grad_() for name, weight in layer.named_parameters()}
    # A layer that is called in another way, or that contains batch norm, cannot be tried alone.
    with suppress(TypeError, ValueError, AssertionError):
        try:
            output = torch.func.functional_call(layer, named, tuple(given))
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [part for part in outputs if isinstance(part, Tensor)]
            _differentiate_twice(tensors, [*leaves, *named.values()])
        except RuntimeError:
            return True
    return False


def learner(net: ModuleNet) -> tuple[MetaState, Episodes]:
    """A state and tasks with random numbers."""
    generator = torch.Generator().manual_seed(0)
    slow = net.init(torch.Generator().manual_seed(0), torch.float64)
    like = torch.empty((), dtype=torch.float64)
    norm, running = init_params(net.norm_layers, 1, like), init_running(net.norm_layers, 1, like)
    rates = {name: like.new_full((1,), 0.01) for name in slow}

    def examples() -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, EXAMPLES, *net.input_shape, generator=generator, dtype=torch.float64)
        if net.objective.has_classes:
            return x, torch.arange(EXAMPLES).remainder(net.outputs).expand(TASKS, -1)
        return x, torch.randn(TASKS, EXAMPLES, net.outputs, generator=generator, dtype=torch.float64)

    return MetaState(slow, norm, rates, running), Episodes(*examples(), *examples())


@torch.no_grad()
def _outputs(net: ModuleNet) -> Tensor:
    """The outputs in a pass without gradients, as in an evaluation."""
    state, episodes = learner(net)
    fast = expanded(state.slow, TASKS)
    return net(fast, episodes.query_x_TECHW, state.norm_pass(0))


def _meta_gradient(net: ModuleNet) -> list[Tensor]:
    """The second-order meta-gradient of STEPS inner steps."""
    state, episodes = learner(net)
    for tensor in state.learnable().values():
        tensor.requires_grad_()
    request = MetaStepRequest(STEPS, [0.5] * STEPS, first_order=False, measure_all=False)
    return [*unrolled(net, state, episodes, request).grads.values()]

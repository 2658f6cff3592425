"""A torch.nn.Module as a function of its parameters, for one task.

Its batch-norm layers are replaced by ours (batch_norm.py): torch's have wrong second derivatives under vmap
(pytorch/functorch#534), and only ours has rows per inner step (BNRS, BNWB) and the three modes of --bn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from mamlctl.core.errors import SettingsError
from mamlctl.core.user_code.importing import errors_of_user_code
from mamlctl.engine.nets.base import HEAD
from mamlctl.engine.nets.batch_norm import MOMENTUM, NormPass, Params

Moments = dict[str, tuple[Tensor, Tensor]]  # layer -> mean_1C, var_1C, as in NormPass.seen
Guard = Callable[[], AbstractContextManager[None]]  # makes the block in which the user's code runs

FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # of batch norm that can be replaced

# First words of the names that mamlctl gives to tensors; a path that begins with one is prefixed by "module".
RESERVED = {"linear", "rate", "running", "moment", "module"}


class Norm(nn.Module):
    """Takes the place of a batch-norm layer; `Template.run` sets the pass that it belongs to."""

    def __init__(self, name: str, layer: _BatchNorm) -> None:
        super().__init__()
        self.name, self.channels, self.eps = name, layer.num_features, layer.eps
        self.norm: NormPass | None = None
        self.fast: Params = {}
        self.examples = 0  # of the pass

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x_EC..., the examples of one task, or several rows of each as in `x.flatten(0, 1)`."""
        assert self.norm is not None
        before = self.norm.seen.get(self.name)
        rows = max(x.shape[0] // self.examples, 1)
        support = rows * self.norm.support_examples
        norm = self.norm if rows == 1 else replace(self.norm, support_examples=support)
        x_E1CHW = x.reshape(x.shape[0], 1, self.channels, -1, 1)
        out = norm(self.name, x_E1CHW, self.fast, self.eps).reshape(x.shape)
        if before is not None:  # a layer that is used twice has the mean statistics of both uses
            seen = self.norm.seen[self.name]
            self.norm.seen[self.name] = (before[0] + seen[0]) / 2, (before[1] + seen[1]) / 2
        return out


class Template:
    """A module whose parameters are replaced in each call."""

    def __init__(self, module: object, head: str | None, guard: Guard | None) -> None:
        """Take over a module; its batch-norm layers are replaced.

        Args:
            module: the module, which belongs to this object from now on.
            head: the path of its head; None for the last linear layer.
            guard: of the user's code; None for a library.

        Raises:
            SettingsError: it has no such head, or has a layer that cannot be used.
        """
        # In evaluation mode without gradients, attention would be computed by other kernels than in training.
        torch.backends.mha.set_fastpath_enabled(False)
        self.guard = guard or partial(errors_of_user_code, None)
        if not isinstance(module, nn.Module):
            raise unusable(f"its function returned a {type(module).__name__}, not a torch.nn.Module")
        _check_layers(module)
        self.head = _head_of(module, head)
        self.norms: dict[str, Norm] = {}  # by name in mamlctl
        self.other_momenta: set[float | None] = set()  # of batch norm, in place of which ours has MOMENTUM
        self.running: Params = {}  # running statistics with which the module starts
        self.norm_start: Params = {}  # batch-norm weights with which it starts
        # Paths of the module's own state dictionary -> the name in mamlctl, or the value of a buffer.
        self.own: dict[str, str | Tensor] = {}
        self._replace_norms(module)
        self.module = module.eval()
        self.recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
        self.paths = {self.internal(path): path for path, _ in module.named_parameters()}
        if not set(HEAD) <= self.paths.keys():
            raise unusable(f"its head '{self.head}' shares its weights with another layer")
        self.buffers = dict(module.named_buffers())
        self._features: Tensor | None = None
        module.get_submodule(self.head).register_forward_pre_hook(self._keep_features, with_kwargs=True)

    def _replace_norms(self, module: nn.Module) -> None:
        by_parameter = {id(weight): self.internal(path) for path, weight in module.named_parameters()}
        for path, tensor in module.state_dict(keep_vars=True).items():
            self.own[path] = by_parameter.get(id(tensor), tensor.detach().clone())
        replaced: dict[nn.Module, Norm] = {}
        # A layer may have several names.
        for path, part in list(module.named_modules(remove_duplicate=False)):
            if not isinstance(part, _BatchNorm):
                continue
            norm = replaced.setdefault(part, Norm(self.internal(path), part))
            name = norm.name
            self.norms[name] = norm
            self.other_momenta |= {part.momentum} - {MOMENTUM}
            self.norm_start |= {f"{name}.weight": part.weight.detach(), f"{name}.bias": part.bias.detach()}
            if part.running_mean is not None and part.running_var is not None:
                self.running |= {f"{name}.mean": part.running_mean, f"{name}.var": part.running_var}
                self.own |= {f"{path}.running_mean": f"{name}.mean", f"{path}.running_var": f"{name}.var"}
            parent, _, last = path.rpartition(".")
            setattr(module.get_submodule(parent), last, norm)

    def _keep_features(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]
    ) -> None:
        self._features = inputs[0] if inputs else named["input"]

    def internal(self, path: str) -> str:
        """The name of a layer or parameter in mamlctl: the head is called "linear" in all networks."""
        owner, _, last = path.rpartition(".")
        if owner == self.head:
            return f"linear.{last}"
        return f"module.{path}" if path.split(".")[0] in RESERVED else path

    def parameters(self, dtype: torch.dtype) -> Params:
        """The values of the parameters, by their names in mamlctl."""
        own = dict(self.module.named_parameters())
        return {name: own[path].detach().clone().cpu().to(dtype) for name, path in self.paths.items()}

    def state_dict(self, values: Mapping[str, Tensor]) -> Params:
        """The state dictionary of the module before batch norm was replaced, with these values of tensors."""
        return {
            path: (values[value] if isinstance(value, str) else value).clone()
            for path, value in self.own.items()
        }

    def run(
        self, fast: Mapping[str, Tensor], x: Tensor, norm: NormPass, *, seed: int | None = None
    ) -> tuple[Tensor, Tensor, Moments]:
        """Compute one task.

        Args:
            fast: the weights of the task; batch norm's are among them if the inner loop adapts them.
            x: the examples x_E....
            norm: batch norm of the pass.
            seed: of the random numbers, in training mode; None for evaluation mode.

        Returns:
            The outputs _EN, the features _EF, and the statistics of each norm layer.

        Raises:
            SettingsError: the module fails.
        """
        own = replace(norm, seen={})
        adapted = {name: weight.unsqueeze(0) for name, weight in fast.items() if name not in self.paths}
        for layer in self.norms.values():
            layer.norm, layer.fast, layer.examples = own, adapted, max(len(x), 1)
        weights = {path: fast[name] for name, path in self.paths.items() if name in fast}
        buffers = {
            name: part.to(x.device, x.dtype if part.is_floating_point() else None)
            for name, part in self.buffers.items()
        }
        try:
            plain, mode = self._plain_operations(x.device), self._mode(seed, x.device)
            with self.guard(), _default_dtype(x.dtype), plain, mode:
                outputs = functional_call(self.module, (weights, buffers), (x,))
        finally:
            kept, self._features = self._features, None
            for layer in self.norms.values():
                layer.norm, layer.fast = None, {}
        if kept is None:
            raise unusable(f"its head '{self.head}' is not used", "name another layer with --head")
        if not isinstance(outputs, Tensor):
            raise unusable(f"it returns a {type(outputs).__name__}, not a tensor of outputs")
        return outputs, kept, own.seen

    @contextmanager
    def _plain_operations(self, device: torch.device) -> Iterator[None]:
        """Avoid kernels without a second derivative: fused attention, and cuDNN's recurrent layers."""
        cudnn = torch.backends.cudnn.flags(enabled=False)
        recurrent = self.recurrent and device.type == "cuda"
        with sdpa_kernel(SDPBackend.MATH), cudnn if recurrent else nullcontext():
            yield

    @contextmanager
    def _mode(self, seed: int | None, device: torch.device) -> Iterator[None]:
        """Training mode with random numbers from a seed; without one, nothing changes."""
        if seed is None:
            yield
            return
        self.module.train()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                yield
        finally:
            self.module.eval()


def unusable(why: str, hint: str = "change the module, or use another --net") -> SettingsError:
    """The error for a module that cannot be used."""
    return SettingsError([(f"--net cannot be used: {why}", hint)])


def _check_layers(module: nn.Module) -> None:
    """Raise SettingsError for a layer that cannot be used in a function of parameters."""
    for name, part in module.named_modules():
        kind = f"'{name}' ({type(part).__name__})"
        if any(map(nn.parameter.is_lazy, part.parameters(recurse=False))):
            raise unusable(f"{kind} does not know its size yet: use a layer with a given size")
        if isinstance(part, _BatchNorm) and not part.affine:
            raise unusable(f"{kind} has no weights: use affine=True")
        if isinstance(part, _BatchNorm) and type(part).forward not in FORWARDS:
            raise unusable(f"{kind} is batch norm with a forward of its own, which would be replaced")
        if isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.track_running_stats:
            raise unusable(f"{kind} keeps running statistics: use track_running_stats=False")

    for name, weight in module.named_parameters():
        if not weight.requires_grad:
            raise unusable(f"its parameter '{name}' has requires_grad=False, but all of them are learnt")


def _head_of(module: nn.Module, head: str | None) -> str:
    """The path of the head. Raises SettingsError if there is no such linear layer."""
    layers = dict(module.named_modules())
    linear = [name for name, part in layers.items() if isinstance(part, nn.Linear)]
    if not linear:
        raise unusable("it has no linear layer, which the head has to be")
    chosen = head or linear[-1]
    part = layers.get(chosen)
    if not isinstance(part, nn.Linear):
        kind = "no layer" if part is None else f"a {type(part).__name__}"
        raise unusable(f"'{chosen}' is {kind}, not a linear layer", f"use --head {' or '.join(linear[-3:])}")
    if part._parameters.get("weight") is None:  # as with spectral norm or weight norm
        raise unusable(f"its head '{chosen}' computes its weights: use a plain nn.Linear")
    if part.bias is None:
        raise unusable(f"its head '{chosen}' has no bias: use bias=True")
    return chosen


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let tensors that the module makes have the dtype of its inputs."""
    before = torch.get_default_dtype()
    if dtype == before:
        yield
        return
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

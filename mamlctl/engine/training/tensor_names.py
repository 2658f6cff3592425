"""The names of a network's tensors in files and patterns, which are those of a state dictionary in torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from mamlctl.core.errors import SettingsError
from mamlctl.core.formatting import elide_middle
from mamlctl.core.problems import nearest
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.inner_loop import RUNNING, MetaState
from mamlctl.engine.nets.base import HEAD, Net
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.settings.schema import TrainConfig

LONGEST = 120  # of a name in messages, with the reason why its tensor does not fit
COUNTER = "num_batches_tracked"  # of torch's batch-norm layers; mamlctl has no use for it


@dataclass(frozen=True)
class TensorNames:
    """The tensors of a network; the networks of mamlctl have layers conv1, norm1, ... and linear."""

    stored: Mapping[str, str]  # name of a parameter or running statistic -> its name in checkpoints
    buffers: Mapping[str, Tensor]  # other tensors of a module, which no meta-step changes

    @property
    def head(self) -> list[str]:
        """The names of the head's weight and bias."""
        return [name for name, stored in self.stored.items() if stored in HEAD]

    def selected(self, patterns: str, option: str, others: Collection[str] = ()) -> set[str]:
        """The names that a comma-separated list of patterns matches.

        Args:
            patterns: patterns as in a shell, names of layers, or the words "head" and "body".
            option: the flag that has them as its value, for messages.
            others: names that they may match besides those of the network.

        Raises:
            SettingsError: a pattern matches nothing.
        """
        names = [*self.stored, *self.buffers, *others]
        groups = {"head": set(self.head), "body": set(self.stored) - set(self.head)}
        chosen = set[str]()
        for pattern in map(str.strip, patterns.split(",")):
            own = (pattern, f"{pattern}.*")
            found = groups.get(pattern) or {n for n in names if any(fnmatchcase(n, one) for one in own)}
            if not found:
                hint = nearest(pattern, names, otherwise=f"use head, body, or patterns of {listed(names)}")
                raise SettingsError([(f"{option}: '{pattern}' matches no tensor of the network", hint)])
            chosen |= found
        return chosen


def names_of(net: Net, state: MetaState) -> TensorNames:
    """The names of a network's tensors; the head is among them even if the algorithm has none."""
    if isinstance(net, ModuleNet):
        template = net.template
        stored, buffers = {}, {}
        for path, own in template.own.items():
            if isinstance(own, str):
                stored[path] = f"{RUNNING}{own}" if own in template.running else own
            elif path.rpartition(".")[2] != COUNTER:
                buffers[path] = own
        return TensorNames(stored, buffers)
    stored = {name: name for name in (*state.slow, *state.norm, *HEAD)}
    for name in state.running:
        layer, _, kind = name.rpartition(".")
        stored[f"{layer}.running_{kind}"] = f"{RUNNING}{name}"
    return TensorNames(stored, {})


def frozen_names(config: TrainConfig, net: Net, state: MetaState) -> frozenset[str]:
    """The tensors that --freeze selects, by their names in checkpoints.

    Args:
        config: the settings.
        net: the network.
        state: its tensors.

    Raises:
        SettingsError: a pattern matches nothing, or no tensor of the network is left to train.
    """
    if config.freeze is None:
        return frozenset()
    names, own = names_of(net, state), state.stored().keys()
    present = TensorNames({name: stored for name, stored in names.stored.items() if stored in own}, {})
    frozen = frozenset(present.stored[name] for name in present.selected(config.freeze, "--freeze"))
    learnt = (state.slow | state.norm).keys() - frozen
    if algorithm_of(config).head_of_zeros(config):
        learnt -= set(HEAD)
    if not learnt:
        epochs = " in --body-epochs" if config.body_epochs else ""
        fact = f"--freeze {config.freeze} leaves no tensor of the network to train{epochs}"
        raise SettingsError([(fact, "freeze fewer tensors; --algo scratch tests a start without training")])
    return frozen


def _shown(name: str) -> str:
    """A name from a file in one short line."""
    return elide_middle("".join(sign if sign.isprintable() else "?" for sign in name), LONGEST)


def listed(names: Collection[str], most: int = 6) -> str:
    """The first few of the names, and the number of the others."""
    first = ", ".join(_shown(name) for name in [*names][:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"

"""The start of a network from given weights (--init): each tensor has to be found, by name and shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import read_object, write_json
from mamlctl.core.formatting import plural
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.inner_loop import MOMENT, RATE, RUNNING, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.training.tensor_names import COUNTER, TensorNames, listed, names_of
from mamlctl.engine.training.weight_files import Weights
from mamlctl.settings.schema import TrainConfig

INIT = "init.json"  # in a run folder
FORMAT = 1  # of it
VARIANCE = ".running_var"  # the end of the names of running variances
# The kinds of differences between a file and a network, in the order of the message.
MISSING, LEFT_OVER, OTHER_SHAPE, UNUSABLE = "missing", "left over", "of another shape", "not usable"


@dataclass(frozen=True)
class Start:
    """Where the weights are from with which a network started, and which of its tensors they are."""

    source: str  # for people
    file: str
    digest: str  # SHA-256 of the file
    unwrapped: tuple[str, ...]  # how the tensors were found in the file, for people
    read: Mapping[str, Sequence[int]]  # name in files -> shape
    not_read: tuple[str, ...]  # the other tensors of the network
    caveat: str  # what a reader of results has to know about the weights

    @property
    def notice(self) -> str:
        """What was read."""
        count, total = len(self.read), len(self.read) + len(self.not_read)
        text = f"start: {count} of {total} {plural(total, 'tensor')} from {self.source}"
        if self.unwrapped:
            text += f" ({', '.join(self.unwrapped)})"
        return text + (f", as drawn: {listed(self.not_read)}" if self.not_read else "")

    def store(self, run: Path) -> None:
        """Write all of it into a run folder."""
        write_json(run / INIT, {"format": FORMAT, **asdict(self)})


def stored_start(run: Path) -> dict[str, str]:
    """The source, the file, the digest and the caveat of a run's start; empty without one."""
    stored = read_object(run / INIT)
    return {
        name: value
        for name in ("source", "file", "digest", "caveat")
        if isinstance(value := stored.get(name), str)
    }


@torch.no_grad()
def start_from(
    weights: Weights, config: TrainConfig, net: Net, state: MetaState, *, source: str, caveat: str = ""
) -> Start:
    """Copy weights into the tensors of a new network.

    Batch-norm weights and statistics of a file go to the rows of all inner steps. Those of a checkpoint keep
    their rows, of which the last is repeated.

    Args:
        weights: the weights.
        config: the settings.
        net: the network.
        state: its tensors, which are changed in place.
        source: where the weights are from, for people.
        caveat: what a reader of results has to know about them.

    Raises:
        SettingsError: they are not those of the network; the message has a table of the differences.
    """
    names, own = names_of(net, state), state.stored()
    tensors, prefixes = _by_names_in_files(weights, names)
    skipped = (
        names.selected(config.init_skip, "--init-skip", tensors) if config.init_skip is not None else set()
    )
    # The head of zeros is part of some algorithms, and others have no head.
    entry = algorithm_of(config)
    if entry.head_of_zeros(config) or entry.training_head == "none":
        skipped |= set(names.head)
    targets = {name: own[stored] for name, stored in names.stored.items() if name not in skipped}
    # Batch norm's tensors are compared row by row; a file has a single one.
    norm = {f"{layer}.{kind}" for layer in net.norm_layers for kind in ("weight", "bias")}
    rows = {n for n, stored in names.stored.items() if stored in norm or stored.startswith(RUNNING)}
    for name in rows & targets.keys():
        targets[name] = targets[name].view(-1, targets[name].shape[-1])
    for name in rows & tensors.keys():
        part = tensors[name]
        if part.layout is torch.strided and (part.dim() == 1 or not weights.of_checkpoint):
            tensors[name] = part.unsqueeze(0)
    buffers = {} if weights.of_checkpoint else names.buffers
    wanted = targets | {name: part for name, part in buffers.items() if name not in skipped}
    common = [name for name in wanted if name in tensors]
    shapes, found = (
        {name: tuple(part.shape[name in rows :]) for name, part in of.items()} for of in (wanted, tensors)
    )
    wrong = {
        MISSING: [name for name in wanted if name not in tensors],
        LEFT_OVER: [name for name in tensors if name not in wanted and name not in skipped],
        OTHER_SHAPE: [
            f"{name} ({_size(found[name])} in place of {_size(shapes[name])})"
            for name in common
            if found[name] != shapes[name]
        ],
    }
    if not any(wrong.values()):
        wrong[UNUSABLE] = _unusable({name: tensors[name] for name in common}, targets, names)
    if any(wrong.values()):
        raise _misfit(config, names, wrong, len(common) - len(wrong[OTHER_SHAPE]), source)
    _check_equal_rows(config, [tensors[name] for name in names.head if name in targets], source)
    for name, target in targets.items():
        value = tensors[name]
        target.copy_(value[torch.arange(len(target)).clamp(max=len(value) - 1)] if name in rows else value)
    not_read = tuple(name for name, stored in names.stored.items() if name in skipped and stored in own)
    unwrapped = (*weights.unwrapped, *prefixes)
    read = {name: shapes[name] for name in targets}
    return Start(source, str(weights.file), weights.digest, unwrapped, read, not_read, caveat)


def _by_names_in_files(weights: Weights, names: TensorNames) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names in files, and the prefixes that were removed or added.

    The inner rates of a checkpoint and the moments of its inner optimiser are no weights, and are left out.
    """
    if weights.of_checkpoint:
        stored = {n: part for n, part in weights.tensors.items() if not n.startswith((RATE, MOMENT))}
        own = {name: stored[of] for name, of in names.stored.items() if of in stored}
        known = {*names.stored.values()}
        return own | {name: part for name, part in stored.items() if name not in known}, []
    found = {n: part for n, part in weights.tensors.items() if n.rpartition(".")[2] != COUNTER}
    words = list[str]()
    # A module that contains a backbone has a prefix that the backbone's file lacks.
    own_parts = {name.partition(".")[0] for name in names.stored.keys() - {*names.head}}
    own_prefix = f"{own_parts.pop()}." if len(own_parts) == 1 else ""
    tensors = found
    while not tensors.keys() & names.stored.keys():
        longer = {own_prefix + name: part for name, part in tensors.items()}
        if longer.keys() & names.stored.keys():
            return longer, [*words, f"with the prefix '{own_prefix}'"]
        parts = {name.partition(".")[::2] for name in tensors}
        if len({first for first, _ in parts}) != 1 or "" in {rest for _, rest in parts}:
            return found, []  # the names have nothing in common
        words.append(f"without the prefix '{next(iter(parts))[0]}.'")
        tensors = {name.partition(".")[2]: part for name, part in tensors.items()}
    return tensors, words


def _unusable(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], names: TensorNames) -> list[str]:
    """The tensors whose values cannot be used, each with the reason.

    Args:
        tensors: those of the file, whose shapes are those of the network.
        targets: the parameters and running statistics of the network into which they go.
        names: of the network.
    """
    reasons = []
    first_of = dict[str, str]()  # name in checkpoints -> the first name in files
    for name, tensor in tensors.items():
        shared = first_of.setdefault(names.stored.get(name, name), name)
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            reasons.append(f"{name} (not a dense tensor)")
        elif name in names.buffers:
            # A run makes its module again, and does not store buffers.
            if not torch.equal(tensor, names.buffers[name].to(tensor.dtype)):
                reasons.append(f"{name} (a buffer, which the module of --net makes with other values)")
        elif not tensor.is_floating_point():
            reasons.append(f"{name} ({_dtype(tensor)})")
        elif not bool(tensor.isfinite().all()):
            reasons.append(f"{name} (NaN or infinite values)")
        elif not bool(tensor.to(targets[name].dtype).isfinite().all()):
            reasons.append(f"{name} (values beyond {_dtype(targets[name])})")
        elif name.endswith(VARIANCE) and bool((tensor < 0).any()):
            reasons.append(f"{name} (negative values)")
        elif not torch.equal(tensor, tensors[shared]):
            reasons.append(f"{name} (differs from {shared}, with which the module shares it)")
    return reasons


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _misfit(
    config: TrainConfig, names: TensorNames, wrong: Mapping[str, Sequence[str]], matched: int, source: str
) -> SettingsError:
    """The error for weights that are not those of the network, with a table of the differences."""
    lines = [f"--init: {source} does not have the tensors of --net {config.net}", _row("matched", matched)]
    lines += [_row(kind, len(found), listed(found, most=3)) for kind, found in wrong.items() if found]
    odd = {entry.partition(" ")[0] for found in wrong.values() for entry in found}
    if odd <= {*names.head}:
        hint = "add --init-skip head, to start with a head as drawn"
    elif not wrong[MISSING] and not wrong[LEFT_OVER] and wrong[OTHER_SHAPE]:
        hint = "use the sizes of network and images that these weights have, or --init-skip"
    elif matched:
        hint = "use the weights of the same network, or leave tensors out with --init-skip"
    else:
        hint = f"use the weights of the same network, whose tensors are {listed([*names.stored])}"
    return SettingsError([("\n".join(lines), hint)])


def _row(kind: str, count: int, shown: str = "") -> str:
    return f"  {kind:<16} {count:>5}  {shown}".rstrip()


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _check_equal_rows(config: TrainConfig, head: Sequence[Tensor], source: str) -> None:
    """Raise SettingsError if an algorithm with equal rows in the head would start with others."""
    equal = all(torch.equal(part, part[:1].expand_as(part)) for part in head)
    if algorithm_of(config).head_start == "equal rows" and not equal:
        fact = f"--algo {config.algo} starts all classes from one row, but {source} has different rows"
        raise SettingsError([(fact, "add --init-skip head")])

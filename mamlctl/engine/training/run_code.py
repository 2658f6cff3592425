"""What a run has that is not built in: found, checked, stored in the run folder, and loaded from it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mamlctl.core.errors import SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import read_object, write_json
from mamlctl.core.formatting import plural
from mamlctl.core.literals import BUILT_IN_NETS, TaskType
from mamlctl.core.user_code.importing import UserCode, import_code
from mamlctl.core.user_code.kinds import load_run_code, named_code, write_run_code
from mamlctl.core.user_code.references import is_reference, locate
from mamlctl.core.user_code.stored import StoredCode, as_stored, trust_by_use
from mamlctl.data.tasks.episodes import Keyed, Tasks
from mamlctl.data.tasks.streams import TaskSource
from mamlctl.data.user_tasks.code import UserTasks
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.algorithms.rules import needs_second_derivatives
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.nets.base import objective_of
from mamlctl.engine.nets.batch_norm import MOMENTUM
from mamlctl.engine.nets.factory import Parts, torchvision_plan
from mamlctl.engine.nets.loss_check import check_loss
from mamlctl.engine.nets.losses import OwnLoss
from mamlctl.engine.nets.module_net import ModuleNet, ModulePlan
from mamlctl.engine.training.module_check import checked
from mamlctl.run_folder import RunFolder
from mamlctl.settings.schema import TrainConfig

PLAN = "net.json"  # how the module of a run is computed
FORMAT = 1


@dataclass(frozen=True)
class RunModule:
    """How the module of a run is made and computed, and the code that makes it."""

    plan: ModulePlan
    why: str  # tasks are computed one by one; "" if they are computed in one pass
    code: StoredCode | None  # None for a network of torchvision
    name: str  # for notices

    @property
    def notice(self) -> str:
        """How tasks are computed."""
        how = "all tasks in one pass" if self.plan.one_pass else f"one task at a time, because {self.why}"
        return f"{self.name}: {how}"


@dataclass(frozen=True)
class RunLoss:
    """The user's loss, and the code that computes it."""

    loss: OwnLoss
    code: StoredCode


@dataclass(frozen=True)
class RunCode:
    """What a run has that is not built in."""

    module: RunModule | None = None  # of --net
    loss: RunLoss | None = None  # of --loss
    tasks: UserTasks | None = None  # of --dataset

    @property
    def parts(self) -> Parts:
        """The parts of the network, for `build`."""
        module, loss = self.module, self.loss
        return Parts(None if module is None else module.plan, None if loss is None else loss.loss)

    @property
    def stored(self) -> dict[str, StoredCode]:
        """The user's code, by the setting that names it."""
        used = {"net": self.module, "loss": self.loss}
        codes = {name: None if part is None else part.code for name, part in used.items()}
        codes["dataset"] = None if self.tasks is None else self.tasks.stored
        return {name: code for name, code in codes.items() if code is not None}

    @property
    def notices(self) -> list[str]:
        """How it is computed."""
        return [] if self.module is None else [self.module.notice]


# The code that a process has checked: the settings and shapes on which a check depends -> the result.
Checked = dict[tuple[Hashable, ...], RunModule | RunLoss]


def new_code(
    config: TrainConfig,
    source: TaskSource,
    on_event: OnEvent,
    *,
    like: Tensor | None = None,
    known: Checked | None = None,
) -> RunCode:
    """What a new run has that is not built in, checked; the user trusts code by training with it.

    Args:
        config: the settings, with all derived values.
        source: the data.
        on_event: receives notices.
        like: a tensor of the device and dtype of the run; None for a CPU.
        known: of other rows of the same grid, which are not checked again; new ones are added.

    Raises:
        SettingsError: the code fails, or it cannot be used.
    """
    known = {} if known is None else known
    before = len(known)
    like = torch.empty((), dtype=tensor_dtype(config.precision)) if like is None else like
    loss = _new_loss(config, source, like, known)
    code = RunCode(_new_module(config, source, known), loss, source.user_tasks)
    if len(known) > before:
        for notice in code.notices:
            on_event(Notice(notice))
        for stored in code.stored.values():
            trust_by_use(stored, on_event)
    return code


def _new_module(config: TrainConfig, source: TaskSource, known: Checked) -> RunModule | None:
    """The module of --net; None for a built-in network. Raises SettingsError if it cannot be used."""
    if config.net in BUILT_IN_NETS:
        return None
    shape = tuple(source.example_shape)
    has_classes = objective_of(shape, config.task_type).has_classes
    key = config.net, config.head, shape, config.ways if has_classes else source.targets, config.task_type
    if key not in known:
        known[key] = _checked_module(*key)
    module = known[key]
    assert isinstance(module, RunModule)
    return module


def _new_loss(config: TrainConfig, source: TaskSource, like: Tensor, known: Checked) -> RunLoss | None:
    """The loss of --loss; None for a built-in one. Raises SettingsError if it cannot be used."""
    if config.loss is None or not is_reference(config.loss):
        return None
    has_classes = objective_of(source.example_shape, config.task_type).has_classes
    outputs = {config.ways if has_classes else source.targets}
    if algorithm_of(config).training_head == "classes" and has_classes:
        outputs.add(source.classes.get("train", config.ways))
    if config.body_epochs:
        outputs.add(config.ways * config.meta_batch_size)
    second_order = needs_second_derivatives(config)
    key = config.loss, *sorted(outputs), like.device, like.dtype, second_order
    if key not in known:
        code = import_code(locate(config.loss, "--loss"))
        loss = OwnLoss(code)
        check_loss(loss, sorted(outputs), like, has_classes=has_classes, second_order=second_order)
        known[key] = RunLoss(loss, as_stored(code))
    checked_loss = known[key]
    assert isinstance(checked_loss, RunLoss)
    return checked_loss


def _checked_module(
    net: str, head: str | None, shape: tuple[int, ...], outputs: int, task_type: TaskType | None
) -> RunModule:
    """Import and check a module; the arguments are those of `ModuleNet` and the kind of the user's tasks."""
    if is_reference(net):
        code = import_code(locate(net, "--net"))
        plan = ModulePlan(code)
    else:
        code, plan = None, torchvision_plan(net)
    unchecked = ModuleNet(plan, shape, outputs, objective_of(shape, task_type), head)
    plan, why = checked(unchecked)
    template = unchecked.template
    size = len(template.paths)
    name = f"{type(template.module).__name__} with {size} {plural(size, 'tensor')}, head '{template.head}'"
    if others := sorted(map(str, template.other_momenta)):
        name += f", batch norm with momentum {MOMENTUM}, not {', '.join(others)}"
    return RunModule(plan, why, None if code is None else as_stored(code), name)


def store_code(folder: Path, code: RunCode) -> None:
    """Write the user's code, and how a module is computed, into a new run folder."""
    write_run_code(folder, code.stored)
    if (module := code.module) is not None:
        plan = {"one_pass": module.plan.one_pass, "random": module.plan.random, "why": module.why}
        write_json(folder / PLAN, {"format": FORMAT, **plan})


def code_of_run(run: RunFolder) -> RunCode:
    """What an existing run has that is not built in, made by the code in its folder.

    Raises SettingsError if the user does not trust that code, or if it is missing, changed or damaged.
    """
    loaded = load_run_code(run.path, named_code(vars(run.config)))
    loss = None
    if "loss" in loaded:
        imported, stored = loaded["loss"]
        loss = RunLoss(OwnLoss(imported), stored)
    tasks = UserTasks(*loaded["dataset"]) if "dataset" in loaded else None
    return RunCode(_module_of_run(run, loaded.get("net")), loss, tasks)


def _module_of_run(run: RunFolder, loaded: tuple[UserCode, StoredCode] | None) -> RunModule | None:
    """The module of an existing run; None for a built-in network.

    Args:
        run: the run.
        loaded: the code that --net names; None if it names no code.

    Raises:
        SettingsError: the file with its plan is missing or damaged.
    """
    if run.config.net in BUILT_IN_NETS:
        return None
    stored = read_object(run.path / PLAN)
    one_pass, random = stored.get("one_pass"), stored.get("random")
    if stored.get("format") != FORMAT or not isinstance(one_pass, bool) or not isinstance(random, bool):
        fact = f"{run.path / PLAN} is missing or damaged"
        raise SettingsError([(fact, "restore it, or train a new run")])
    imported, code = loaded or (None, None)
    plan = torchvision_plan(run.config.net) if imported is None else ModulePlan(imported)
    why = str(stored.get("why") or "")
    return RunModule(replace(plan, one_pass=one_pass, random=random), why, code, run.config.net)


def training_tasks(stream: Tasks, code: RunCode, seed: int) -> Tasks:
    """The tasks of meta-training, with their random numbers if a module draws any.

    Args:
        stream: the tasks.
        code: what the run has that is not built in.
        seed: of the run.
    """
    return Keyed(stream, seed) if code.module is not None and code.module.plan.random else stream

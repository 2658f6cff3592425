"""The module of a run whose network is not built in: found, checked, stored in the run folder, and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import read_object, write_json
from mamlctl.core.formatting import plural
from mamlctl.core.literals import BUILT_IN_NETS
from mamlctl.core.user_code.importing import import_code
from mamlctl.core.user_code.kinds import check_same_code, load_run_code, write_run_code
from mamlctl.core.user_code.references import is_reference, locate
from mamlctl.core.user_code.stored import StoredCode, as_stored, trust
from mamlctl.data.tasks.episodes import Keyed, Tasks
from mamlctl.engine.nets.base import objective_of
from mamlctl.engine.nets.factory import torchvision_plan
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
    def codes(self) -> dict[str, StoredCode]:
        """The code by the setting that names it."""
        return {} if self.code is None else {"net": self.code}

    @property
    def notice(self) -> str:
        """How tasks are computed."""
        how = "all tasks in one pass" if self.plan.one_pass else f"one task at a time, because {self.why}"
        return f"{self.name}: {how}"


# The modules that a process has checked: --net, --head, input shape and number of outputs -> the module.
Checked = dict[tuple[str, str | None, tuple[int, ...], int], RunModule]


def new_module(
    config: TrainConfig,
    example_shape: Sequence[int],
    on_event: OnEvent,
    *,
    targets: int = 1,
    known: Checked | None = None,
) -> RunModule | None:
    """The module of a new run, which the user trusts by training it; None for a built-in network.

    Args:
        config: the settings, with all derived values.
        example_shape: C, H, W of images, or D of points.
        on_event: receives notices.
        targets: for regression: the number of values to predict.
        known: of other rows of the same grid, which are not checked again; the new one is added.

    Raises:
        SettingsError: the code fails, or the module cannot be used.
    """
    if config.net in BUILT_IN_NETS:
        return None
    outputs = targets if len(example_shape) == 1 else config.ways
    key = config.net, config.head, tuple(example_shape), outputs
    if known is not None and key in known:
        return known[key]
    module = _checked_module(*key)
    if known is not None:
        known[key] = module
    on_event(Notice(module.notice))
    if module.code is not None:
        try:
            trust(module.code)
        except MamlctlError as error:
            on_event(Notice(f"{error.message}: eval and --resume will need --trust-code"))
    return module


def _checked_module(net: str, head: str | None, shape: tuple[int, ...], outputs: int) -> RunModule:
    """Import and check a module."""
    if is_reference(net):
        code = import_code(locate(net, "--net"))
        plan = ModulePlan(code)
    else:
        code, plan = None, torchvision_plan(net)
    unchecked = ModuleNet(plan, shape, outputs, objective_of(shape), head)
    plan, why = checked(unchecked)
    module, size = unchecked.template.module, len(unchecked.template.paths)
    name = f"{type(module).__name__} with {size} {plural(size, 'tensor')}, head '{unchecked.template.head}'"
    return RunModule(plan, why, None if code is None else as_stored(code), name)


def store_module(folder: Path, module: RunModule | None) -> None:
    """Write the module's code and how it is computed into a new run folder."""
    if module is None:
        return
    write_run_code(folder, module.codes)
    plan = {"one_pass": module.plan.one_pass, "random": module.plan.random, "why": module.why}
    write_json(folder / PLAN, {"format": FORMAT, **plan})


def module_of_run(run: RunFolder) -> RunModule | None:
    """The module of an existing run, made by the code in its folder; None for a built-in network.

    Raises SettingsError if the user does not trust that code, or if it is missing, changed or damaged.
    """
    if run.config.net in BUILT_IN_NETS:
        return None
    stored = read_object(run.path / PLAN)
    one_pass, random = stored.get("one_pass"), stored.get("random")
    if stored.get("format") != FORMAT or not isinstance(one_pass, bool) or not isinstance(random, bool):
        fact = f"{run.path / PLAN} is missing or damaged"
        raise SettingsError([(fact, "restore it, or train a new run")])
    if is_reference(run.config.net):
        imported, code = load_run_code(run.path, ["net"])["net"]
        plan = ModulePlan(imported)
    else:
        code, plan = None, torchvision_plan(run.config.net)
    plan, why = replace(plan, one_pass=one_pass, random=random), str(stored.get("why") or "")
    return RunModule(plan, why, code, run.config.net)


def plan_of(module: RunModule | None) -> ModulePlan | None:
    """The plan of a module, for `build`."""
    return None if module is None else module.plan


def training_tasks(stream: Tasks, module: RunModule | None, seed: int) -> Tasks:
    """The tasks of meta-training, with their random numbers if the module draws any.

    Args:
        stream: the tasks.
        module: None for a built-in network.
        seed: of the run.
    """
    return Keyed(stream, seed) if module is not None and module.plan.random else stream


def check_cell(run: RunFolder, module: RunModule | None) -> None:
    """Raise SettingsError if a run of a grid was trained with other code than the one that is there now."""
    if module is not None:
        check_same_code(run.path, module.codes)

"""The weights with which a run starts (--init): of a file, another run or a model that ships."""

from __future__ import annotations

from collections.abc import Sequence

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.data.sets.registry import has_classes, is_table
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.checkpoints import BEST, LAST, PREVIOUS
from mamlctl.engine.training.starting_weights import Start, start_from, stored_start
from mamlctl.engine.training.weight_files import Weights, file_digest, read_weights
from mamlctl.experiments.settings import fill_defaults
from mamlctl.experiments.trained_model import checkpoint_files
from mamlctl.run_folder import RunFolder, open_run
from mamlctl.settings.schema import TrainConfig
from mamlctl.shipped_models import is_model, weights_place

# Settings that decide which classes or tasks are those of the test.
OF_SPLIT = ("split_scheme", "split_fractions", "split_seed", "classes")


def apply_start(config: TrainConfig, net: Net, state: MetaState, on_event: OnEvent) -> Start | None:
    """Copy the weights that --init names into the tensors of a new network; None without --init.

    Args:
        config: the settings, with all derived values.
        net: the network.
        state: its tensors, which are changed in place.
        on_event: receives notices.

    Raises:
        SettingsError: there are no such weights, or they are not those of the network.
    """
    if config.init is None:
        return None
    place = weights_place(config.init)
    source = config.init if is_model(config.init) else str(place)
    if place.is_dir():
        try:
            run = open_run(place)
            weights, caveat = _of_run(config, run, source, on_event)
        except MamlctlError as error:
            raise SettingsError([(f"--init: {error.message}", error.hint)]) from error
        if not is_model(config.init):
            other = run.config.net
            source += f" ({weights.file.name}{f' of --net {other}' if other != config.net else ''})"
    else:
        weights, caveat = read_weights(place), _caveat(config, source)
    started = start_from(weights, config, net, state, source=source, caveat=caveat)
    for text in (started.notice, caveat):
        if text:
            on_event(Notice(text))
    return started


def _of_run(config: TrainConfig, run: RunFolder, source: str, on_event: OnEvent) -> tuple[Weights, str]:
    """The weights of a run's best checkpoint, without running its code, and their caveat.

    Args:
        config: the settings of the run that starts.
        run: the other run.
        source: its name for people.
        on_event: receives notices.

    Raises:
        MamlctlError: no checkpoint is whole.
    """
    files, _ = checkpoint_files(run, None, on_event)
    errors = list[MamlctlError]()
    for file in dict.fromkeys((*files, *(run.checkpoints / name for name in (BEST, LAST, PREVIOUS)))):
        try:
            stored = checkpoints.load(file, owner=run.owner)["stored"]
        except MamlctlError as error:
            errors.append(error)
            continue
        if errors:
            on_event(Notice(f"{errors[0].message}: using {file.name}"))
        weights = Weights(file, file_digest(file), stored, of_checkpoint=True)
        if run.config.dataset != config.dataset:  # whose own data may no longer exist
            return weights, _caveat(config, source)
        earlier = fill_defaults(run.config)
        same_split = all(getattr(earlier, name) == getattr(config, name) for name in OF_SPLIT)
        own = stored_start(run.path).get("caveat", "")
        return weights, own if same_split else _caveat(config, source)
    raise errors[0]


def _caveat(config: TrainConfig, source: str) -> str:
    """What is unknown about weights that were trained on other data; "" for endless tasks."""
    if not has_classes(config) and not is_table(config.dataset):
        return ""
    what = "classes" if has_classes(config) else "tasks"
    return f"the start, {source}, may have been trained on the test {what}"


def start_again(run: RunFolder, config: TrainConfig, net: Net, state: MetaState, on_event: OnEvent) -> None:
    """Do the same as `apply_start` for a run that is resumed without a checkpoint.

    Args:
        run: the run.
        config, net, state, on_event: as in `apply_start`.

    Raises:
        SettingsError: as `apply_start` does, and if the file has changed.
    """
    started = apply_start(config, net, state, on_event)
    if started is not None:
        check_unchanged(run, started)
        started.store(run.path)


def check_starts(
    cells: Sequence[RunFolder], config: TrainConfig, net: Net, state: MetaState, on_event: OnEvent
) -> None:
    """Check the start of the cells of a grid's row, unless all of them have begun to train.

    Args:
        cells: the cells, whose folders need not exist yet.
        config, net, state, on_event: as in `apply_start`.

    Raises:
        SettingsError: as `apply_start` does, and if a cell started with other weights than the file has now.
    """
    if all((cell.checkpoints / LAST).exists() for cell in cells):
        return
    started = apply_start(config, net, state, on_event)
    if started is not None:
        for cell in cells:
            check_unchanged(cell, started)


def check_unchanged(run: RunFolder, started: Start) -> None:
    """Raise SettingsError if a run started with other weights than the file has now."""
    before = stored_start(run.path).get("digest", started.digest)
    if before != started.digest:
        fact = f"{started.file} has digest {started.digest:.12}, but {run.path} started from {before:.12}"
        raise SettingsError([(fact, "restore that file, or use another --out")])

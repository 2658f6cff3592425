"""A trained run ready for predictions: its checkpoints, its data, and how its algorithm adapts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.formatting import plural
from mamlctl.core.literals import HIGHER_IS_BETTER, BatchNormMode
from mamlctl.core.results import KEPT
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.rules import metric_of
from mamlctl.data.sets.registry import find_data_set, has_classes
from mamlctl.data.tasks.disjoint import DisjointTasks
from mamlctl.data.tasks.episodes import Episodes, MiniBatches, Placement, Tasks
from mamlctl.data.tasks.streams import TaskSource, open_streams
from mamlctl.data.tasks.table_tasks import table_stream
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.evaluation.adapted_model import head_words, resize_head
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import Predict, PredictRequest
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import bn_mode
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.checkpoints import BEST, LAST, PREVIOUS
from mamlctl.engine.training.initial_state import adapted_names, build
from mamlctl.engine.training.progress import epoch_file
from mamlctl.engine.training.run_code import RunCode, code_of_run
from mamlctl.engine.training.starting_weights import stored_start
from mamlctl.experiments.environment import kernels_announced
from mamlctl.experiments.evaluation_settings import evaluation_setup
from mamlctl.experiments.settings import fill_defaults
from mamlctl.experiments.training_images import check_folder, check_own_data, overlap_notes, stored_split
from mamlctl.run_folder import RunFolder, open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig


@dataclass(frozen=True)
class TrainedModel:
    """A run with everything that its evaluation needs."""

    run: RunFolder
    config: TrainConfig  # with all derived values, and those that the evaluation replaces
    source: TaskSource
    stream: Tasks
    device: torch.device
    derivatives: Derivatives
    predict: Predict
    states: Sequence[MetaState]  # best first
    epochs: Sequence[int]  # of the states; empty before the first validation
    code: RunCode  # what is not built in
    notes: tuple[str, ...] = ()  # caveats about the results

    @property
    def inner_steps(self) -> int:
        """Inner steps on every support set."""
        return self.config.evaluation_inner_steps

    @property
    def statistics(self) -> Statistics:
        """The statistics that normalise a query set."""
        return Statistics(self.config.bn)

    @property
    def bn(self) -> BatchNormMode:
        """The batch-norm mode; "none" without batch norm."""
        return bn_mode(self.derivatives.net, self.config.bn)

    @torch.no_grad()
    def outputs(self, episodes: Episodes, inner_steps: int, *, per_step: bool = True) -> torch.Tensor:
        """Predict query sets by the best checkpoint -> outputs_ITEN; arguments as in `PredictRequest`."""
        sets, state = TaskSets(self.derivatives, episodes), self.states[0].frozen()
        return self.predict(PredictRequest(sets, state, inner_steps, self.statistics, per_step))


def load_trained_model(path: Path, settings: EvalConfig, *, offline: bool, on_event: OnEvent) -> TrainedModel:
    """Open a run for an evaluation.

    Args:
        path: the run folder.
        settings: the settings of the evaluation.
        offline: never download.
        on_event: receives progress and notices.

    Raises:
        SettingsError: the run cannot be evaluated with these settings.
        DataError: its data are missing or damaged.
        MamlctlError: the run or a checkpoint is missing or damaged.
    """
    run = open_run(path)
    if settings.dataset is None:
        check_folder(run, f"mamlctl eval {path}")
    code = code_of_run(run)
    config, device, keeps = evaluation_setup(run, settings, on_event)
    files, notes = checkpoint_files(run, settings.checkpoint, on_event)
    on_event(Waiting.for_data(config.dataset))
    streams, source = open_streams(
        config,
        (settings.split,),
        Placement(device, tensor_dtype(config.precision)),
        offline=offline,
        on_event=on_event,
        stored=code.tasks or (stored_split(run) if keeps else None),
        disjoint=settings.disjoint,
    )
    stream = streams[settings.split]
    same = run.trained_on(source.digest, source.older_digests)  # or nothing is known
    own = keeps and same and run.dataset_digest is not None
    if own and config.dataset != run.config.dataset:
        moved = f"{config.dataset} has the {'rows' if source.table else 'images'} of {run.config.dataset}"
        on_event(Notice(f"{moved}: using the split of the run"))
        config = replace(config, dataset=run.config.dataset)  # so that the protocol is that of the same test
    check_own_data(run, settings, source, same=same)
    notes += _conversion_notes(run.config, config) + _task_notes(stream, settings)
    if keeps and not same:
        notes += ("the data are not those of the training: images or classes have changed",)
        on_event(Notice(notes[-1]))
    if caveat := stored_start(path).get("caveat"):
        notes += (caveat,)
    notes += overlap_notes(run, settings, source, own=own, on_event=on_event)
    shape = source.example_shape
    states, epochs, damage = load_states(run, files, settings, shape, device, on_event, code=code)
    notes += damage
    if settings.models == "ensemble" and not epochs:
        why = (
            "--checkpoint names one model"
            if settings.checkpoint
            else f"{run.path} has not been validated yet"
        )
        raise SettingsError([(f"--models is ensemble, but {why}", "use --models best")])
    if settings.ways not in (None, run.config.ways):
        words = head_words(algorithm_of(config).classifier, run.config.ways, states[0], config.ways)
        notes += (f"trained with {run.config.ways} classes per task, tested with {config.ways}: {words}",)
    net, _ = build(config, shape, torch.device("meta"), targets=source.targets, parts=code.parts)
    with kernels_announced(device, on_event):
        derivatives = select_derivatives(net, states[0].example_tensor, config.engine)
    return TrainedModel(
        run=run,
        config=config,
        source=source,
        stream=stream,
        device=device,
        derivatives=derivatives,
        predict=algorithm_of(config).predict(config),
        states=states,
        epochs=epochs,
        code=code,
        notes=notes,
    )


def _conversion_notes(trained: TrainConfig, config: TrainConfig) -> tuple[str, ...]:
    """How the images of another data set are converted for the run's network."""
    if config.dataset == trained.dataset:
        return ()
    note = f"trained on {trained.dataset}, tested on {config.dataset}"
    if not has_classes(config) or names_tasks(config.dataset):
        return (note,)
    data_set = find_data_set(config.dataset)
    channels, side, _ = data_set.image_shape_CHW
    if data_set.open_shaped is not None or side != config.image_size:
        note += f", with images resized to {config.image_size}x{config.image_size} pixels"
    if data_set.open_shaped is None and channels < (config.channels or channels):
        note += ", with grey copied to three colours"
    return (note,)


def _task_notes(stream: Tasks, settings: EvalConfig) -> tuple[str, ...]:
    """Notes about disjoint tasks, tasks of a table that are drawn again, and reordered labels."""
    tasks = stream.stream if isinstance(stream, MiniBatches) else stream
    notes = [tasks.words(settings.tasks)] if isinstance(tasks, DisjointTasks) else []
    if (table := table_stream(stream)) is not None:
        different = table.different(settings.tasks)
        drawn = f"{settings.tasks} draws of rows from the {different} {settings.split} tasks of the table"
        notes.append(f"{drawn}: scores are means over the draws of a task, intervals are over tasks")
    if (orders := settings.label_permutations) > 1:
        notes.append(f"the score of each task is its mean over {orders} orders of its labels")
    return tuple(notes)


def load_states(
    run: RunFolder,
    files: Sequence[Path],
    settings: EvalConfig,
    example_shape: Sequence[int],
    device: torch.device,
    on_event: OnEvent,
    *,
    code: RunCode,
) -> tuple[list[MetaState], list[int], tuple[str, ...]]:
    """Load checkpoints, with the inner learning rates of the settings if they replace the run's.

    Args:
        run: the run.
        files: the checkpoints, best first. Damaged ones are left out; best.pt, a copy of the first, is used
            in its place. If none is left, others of the run are tried.
        settings: the settings of the evaluation.
        example_shape: C, H, W of an image, or the size of a point.
        device: where the tensors go.
        on_event: receives notices.
        code: what the run has that is not built in.

    Returns:
        The states, their epochs (none for a state that was not validated), and notes about damage.

    Raises:
        MamlctlError: no checkpoint is whole.
        SettingsError: the run has no inner learning rates for the layers that the settings adapt.
    """
    others = [] if settings.checkpoint else [run.checkpoints / name for name in (BEST, LAST, PREVIOUS)]
    loaded: dict[Path, tuple[MetaState, int | None]] = {}
    errors = list[MamlctlError]()
    for file in dict.fromkeys((files[0], *others[:1], *files[1:], *others[1:])):
        if loaded and settings.models == "best":
            break
        if file in files or (not loaded and file.exists()):
            try:
                loaded[file] = _load_state(run, file, settings, example_shape, device, code)
            except SettingsError:
                raise
            except MamlctlError as error:
                errors.append(error)
    if not loaded:
        raise MamlctlError(_damage_words(errors), hint=errors[0].hint)
    states, epochs = zip(*loaded.values(), strict=True)
    notes = _damage_notes(errors, list(loaded), on_event) if errors else ()
    return list(states), [epoch for epoch in epochs if epoch is not None], notes


def _damage_notes(errors: Sequence[MamlctlError], used: Sequence[Path], on_event: OnEvent) -> tuple[str, ...]:
    """Report which checkpoints are used instead of damaged ones."""
    note = f"{_damage_words(errors)}: using {', '.join(file.name for file in used)}"
    on_event(Notice(note))
    return (note,)


def _damage_words(errors: Sequence[MamlctlError]) -> str:
    first, *others = (error.message for error in errors)
    more = f"; {len(others)} other {plural(len(others), 'checkpoint')} cannot be used either"
    return first + (more if others else "")


def _load_state(
    run: RunFolder,
    file: Path,
    settings: EvalConfig,
    example_shape: Sequence[int],
    device: torch.device,
    code: RunCode,
) -> tuple[MetaState, int | None]:
    """A checkpoint's state and epoch (None in `last.pt`); arguments and exceptions as in `load_states`."""
    content = checkpoints.load(file, owner=run.owner)
    bias = content["stored"].get("linear.bias")
    outputs = None if bias is None else bias.numel()
    config = fill_defaults(run.config)
    _, state = build(config, example_shape, device, classes=outputs, targets=outputs or 1, parts=code.parts)
    checkpoints.restore(state.stored(), content["stored"], file)
    state = _with_rates(state, settings)
    if (ways := settings.ways) is not None and algorithm_of(run.config).classifier == "head":
        head_words("head", run.config.ways, state, ways)  # raises an error if its head cannot be resized
        state = resize_head(state, ways, "head")
    return state, content.get("epoch")


def _with_rates(state: MetaState, settings: EvalConfig) -> MetaState:
    """Replace the inner learning rates that the settings name. Raises SettingsError if there are none."""
    rates = state.rates
    if settings.adapts is not None:
        names = adapted_names(state.slow, settings.adapts)
        if state.rates_learnt and not set(names) <= rates.keys():
            fact = f"--adapts is {settings.adapts}, but the run learnt no rates for those layers"
            raise SettingsError([(fact, "leave it out")])
        rate = next(iter(rates.values()))
        rates = {name: rates.get(name, rate) for name in names}
    if (lr := settings.inner_lr) is not None:
        rates = {name: torch.full_like(rate, lr) for name, rate in rates.items()}
    return replace(state, rates=rates)


def checkpoint_files(
    run: RunFolder, chosen: str | None, on_event: OnEvent
) -> tuple[list[Path], tuple[str, ...]]:
    """The best checkpoints, best first, and notes; the last one if there was no validation yet.

    Args:
        run: the run.
        chosen: the checkpoint to use instead, its name in the run's checkpoints folder or a path.
        on_event: receives notices.
    """
    if chosen is not None:
        file = run.checkpoint(chosen)
        return [file], (f"with checkpoint {file.name}",)
    best, last = run.checkpoints / BEST, run.checkpoints / LAST
    if [*run.checkpoints.glob("*.pt")] == [best]:
        return [best], ()  # a model without what only training needs
    try:
        content = checkpoints.load(last, owner=run.owner)
        if "position" not in content:
            raise checkpoints.damaged(last, "does not record which epochs were best")
    except MamlctlError as error:
        ranked = _ranked_epochs(run)
        return (ranked, _damage_notes([error], ranked, on_event)) if ranked else ([last], ())
    top = content["position"]["top"]
    if not top:
        on_event(Notice(f"{run.path} has not been validated yet: using its last checkpoint"))
        return [last], ()
    return [epoch_file(run, int(epoch)) for epoch, *_ in top], ()


def _ranked_epochs(run: RunFolder) -> list[Path]:
    """The undamaged checkpoints of epochs, one of each, best first."""
    sign = -1 if metric_of(run.config) in HIGHER_IS_BETTER else 1
    found = dict[int, tuple[float, int, Path]]()
    for file in (*run.checkpoints.glob("epoch-*.pt"), run.checkpoints / BEST):
        # A copy of last.pt under this name has no score.
        with suppress(MamlctlError, KeyError):
            content = checkpoints.load(file, owner=run.owner)
            epoch = content["epoch"]
            found.setdefault(epoch, (sign * content["val_score"], epoch, file))
    return [file for *_, file in sorted(found.values())[:KEPT]]

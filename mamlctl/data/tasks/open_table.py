"""Open a table of regression tasks: what is left out, how its tasks are divided, and one stream per split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.formatting import one_line, plural
from mamlctl.core.literals import Split
from mamlctl.data.reading.tables import TaskTable, read_table
from mamlctl.data.sets.folder_layout import FRACTIONS
from mamlctl.data.tasks.episodes import StreamSettings
from mamlctl.data.tasks.table_tasks import TableFacts, TableStream, divided, standardisation_of
from mamlctl.settings.schema import TrainConfig

MOST_NAMED = 5  # rows, tasks or classes in a message


def open_table(
    config: TrainConfig, stored: Mapping[str, Sequence[str]] | None, on_event: OnEvent
) -> tuple[TaskTable, TableFacts]:
    """Read a table and divide its tasks -> the table, and what a run stores about it.

    Args:
        config: the complete settings.
        stored: the tasks of each split when the run started; None to divide them now.
        on_event: receives notices about what is left out.

    Raises:
        SettingsError: a setting has no effect on this table, or there are too few tasks.
        DataError: the file cannot be read, a stored task is missing, or --strict refuses what it has.
    """
    assert config.inputs is not None and config.targets is not None  # filled in by `fill_defaults`
    table = read_table(Path(config.dataset), config.inputs, config.targets)
    if table.left_out:
        count = len(table.left_out)
        fact = f"{count} {plural(count, 'row')} of {config.dataset} with missing numbers"
        leave_out(config, fact, table.left_out, "fill in the numbers or remove the rows", on_event)
    if table.splits and config.split_fractions is not None:
        fact = f"--split-fractions has no effect: {config.dataset} has a column split"
        raise SettingsError([(fact, "leave it out")])
    rows = 1
    if stored is None:
        rows = max(config.shots, config.train_shots or 0) + config.queries
        usable = _large_enough(config, table, table.tasks, rows, on_event)
        tasks = divided(table, usable, config.split_fractions or FRACTIONS, config.split_seed)
        if not tasks["test"]:  # training needs none, and finding this out after it would be late
            name = Path(config.dataset).name
            on_event(Notice(f"{name} has no task in 'test': eval will need --split val or another --dataset"))
    else:
        known = set(table.tasks)
        if gone := [name for names in stored.values() for name in names if name not in known]:
            fact = (
                f"{config.dataset} no longer has task {one_line(gone[0])!r}, which is in the split of the run"
            )
            raise DataError(fact, hint="restore the table, or train a new run")
        tasks = {split: tuple(names) for split, names in stored.items()}
    _check_split(config, table, "train", tasks["train"], rows)
    return table, TableFacts(standardisation_of(table, tasks["train"]), tasks)


def table_streams(
    config: TrainConfig,
    table: TaskTable,
    facts: TableFacts,
    settings: Mapping[Split, StreamSettings],
    on_event: OnEvent,
) -> dict[str, TableStream]:
    """A stream of tasks for each split, without tasks that have too few rows.

    Args:
        config: the complete settings.
        table: the table.
        facts: the tasks of each split, and the statistics of the columns.
        settings: the sizes of the tasks of each split.
        on_event: receives notices.

    Raises:
        SettingsError: a split has no task that is large enough.
        DataError: --strict refuses small tasks.
    """
    streams = dict[str, TableStream]()
    for split, part in settings.items():
        rows = part.shots + part.queries
        names = _large_enough(config, table, facts.tasks[split], rows, on_event)
        _check_split(config, table, split, names, rows)
        streams[split] = TableStream(table, names, facts.standardisation, part)
    return streams


def _large_enough(
    config: TrainConfig, table: TaskTable, names: Sequence[str], rows: int, on_event: OnEvent
) -> tuple[str, ...]:
    """The tasks with enough rows; the others are named in a notice."""
    count_of = dict(zip(table.tasks, table.counts.tolist(), strict=True))
    small = [f"{one_line(name)} ({count_of[name]})" for name in names if count_of[name] < rows]
    if small:
        what = f"{len(small)} {plural(len(small), 'task')} with fewer than {rows} complete rows"
        fact = f"{what} (--shots plus --queries)"
        leave_out(config, fact, small, "use fewer --shots or --queries, add rows", on_event)
    return tuple(name for name in names if count_of[name] >= rows)


def leave_out(config: TrainConfig, fact: str, named: Sequence[str], hint: str, on_event: OnEvent) -> None:
    """Send a notice of what is left out of the user's own data.

    Args:
        config: the complete settings.
        fact: what is left out, and why.
        named: the names of all that is left out.
        hint: what to do besides leaving out --strict.
        on_event: receives the notice.

    Raises:
        DataError: --strict refuses it.
    """
    words = f"{fact}: {', '.join(named[:MOST_NAMED])}{', ...' if len(named) > MOST_NAMED else ''}"
    if config.strict:
        raise DataError(f"--strict refuses {words}", hint=f"{hint}, or leave out --strict")
    on_event(Notice(f"left out: {words}"))


def _check_split(config: TrainConfig, table: TaskTable, split: str, names: Sequence[str], rows: int) -> None:
    if not names:
        enough = f"{rows} complete {plural(rows, 'row')} (--shots plus --queries)"
        fact = f"{Path(config.dataset).name} has no task in '{split}' with {enough}"
        hint = "add tasks, use fewer --shots or --queries, or other --split-fractions than "
        hint += config.split_fractions or FRACTIONS
        if table.splits:
            hint = f"add tasks with {split} in the column split, or use fewer --shots or --queries"
        raise SettingsError([(fact, hint)])

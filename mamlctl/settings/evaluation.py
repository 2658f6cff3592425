"""The schema of the settings of an evaluation."""

# ruff: noqa: RUF009 - every default here is a field of a frozen dataclass

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from mamlctl.core.literals import Adapts, BatchNorm, ClassLevel, Models, Split
from mamlctl.settings.fields import EPISODE, HARDWARE, INNER, LARGEST, NETWORK, SEEDS, setting
from mamlctl.settings.schema import FIELDS, TrainConfig


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation. `None`: as the run was trained."""

    split: Split = setting("test", EPISODE, "Split to draw test tasks from.", common=True)
    tasks: int = setting(600, EPISODE, "Number of test tasks.", common=True, least=2)
    ways: int | None = setting(
        None, EPISODE, "Classes per task (default: as in training).", common=True, least=2
    )
    shots: int | None = setting(
        None,
        EPISODE,
        "Support examples per class, or trajectories (default: as in training).",
        common=True,
        least=1,
    )
    queries: int | None = setting(
        None,
        EPISODE,
        "Query examples per class, or trajectories (default: as in training).",
        common=True,
        least=1,
    )
    disjoint: bool = setting(
        False, EPISODE, "Use no image in more than one task, as far as the split allows."
    )
    label_permutations: int = setting(
        1, EPISODE, "Label orders over which each task's score is averaged.", least=1
    )
    dataset: str | None = setting(
        None, EPISODE, "Another data set to test on, with images converted to the run's shape.", common=True
    )
    classes: ClassLevel | None = setting(
        None,
        EPISODE,
        "With --dataset, for a folder: its classes are the top folders or the innermost ones (leaf; default: "
        "leaf if all top folders contain only folders).",
    )
    allow_overlap: bool = setting(
        False,
        EPISODE,
        "With --dataset: test even on images that the run was trained on.",
        decides=False,
    )
    checkpoint: str | None = setting(
        None, NETWORK, "Checkpoint of the run (default: the best ones), e.g. epoch-0003.pt."
    )
    models: Models = setting(
        "all",
        NETWORK,
        "What to test: the best checkpoint, the ensemble of the best ones, or both.",
        common=True,
    )
    eval_seed: int | None = setting(
        None, EPISODE, "Seed of the test tasks (default: the run's).", least=0, below=SEEDS
    )
    adapts: Adapts | None = setting(None, INNER, "Layers that the inner loop changes (default: the run's).")
    inner_steps: int | None = setting(
        None,
        INNER,
        "Inner steps (gradient steps on the support set; default: the run's).",
        common=True,
        least=0,
    )
    per_step: bool = setting(
        False,
        INNER,
        "Also score the queries after every inner step, which takes longer; implied by --plot, by curves "
        "and by policies.",
        before=True,
        common=True,
    )
    per_step_tasks: int | None = setting(
        None, INNER, "With --per-step: how many of the first tasks to score so (default: all).", least=2
    )
    inner_lr: float | None = setting(
        None, INNER, "Inner learning rate, if it was not learnt (default: the run's).", above=0, below=LARGEST
    )
    bn: BatchNorm | None = setting(
        None,
        INNER,
        "Batch-norm statistics for queries: the queries' own, those kept in training, "
        "or the support set's (default: the run's).",
        common=True,
    )
    device: str = field(default=TrainConfig.device, metadata=FIELDS["device"].metadata)
    data_root: str | None = setting(
        None, HARDWARE, "Folder of prepared data sets (default: the run's).", decides=False, variable=True
    )

    @property
    def curve_tasks(self) -> int:
        """The number of tasks, the first ones, that are scored after every inner step."""
        return min(self.per_step_tasks or self.tasks, self.tasks) if self.per_step else 0

    def over(self, trained: TrainConfig) -> TrainConfig:
        """The settings of a trained run, with the values that this evaluation replaces."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in FIELDS}
        values["eval_inner_steps"] = values.pop("inner_steps")
        given = {name: value for name, value in values.items() if value is not None}
        if "shots" in given:  # for every split, also the training classes
            given["train_shots"] = None
        return replace(trained, **given)

"""Settings: one flat dataclass; the rules that its fields keep are in `rules.py`.

A field's name is its flag, its preset key, its `config.yaml` key and its table column;
its default is written only here.
"""

# ruff: noqa: RUF009 - every default here is a field of a frozen dataclass

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from mamlctl.core.literals import (
    Activation,
    Adapts,
    Augment,
    BatchNorm,
    EngineName,
    InnerOptimizer,
    NetName,
    Normalize,
    Obstacle,
    Pooling,
    Precision,
    Readout,
    Rotations,
    Split,
)
from mamlctl.settings.fields import (
    EPISODE,
    HARDWARE,
    INNER,
    LARGEST,
    MAMLPP,
    MOST_TASKS,
    NETWORK,
    OUTER,
    OUTPUT,
    SEEDS,
    Improvement,
    improvement,
    setting,
)


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training run. `None` means: derived, by `fill_schedules` or by the data set."""

    dataset: str = setting(
        "omniglot", EPISODE, "Data set: a name, or a folder with a folder of images per class."
    )
    ways: int = setting(5, EPISODE, "Classes per task.", least=2)
    shots: int = setting(1, EPISODE, "Support examples per class.", least=1)
    queries: int = setting(1, EPISODE, "Query examples per class.", least=1)
    train_shots: int | None = setting(
        None, EPISODE, "Support examples per class in training, where they differ from --shots.", least=1
    )
    split_scheme: str | None = setting(None, EPISODE, "How classes are split into train, val and test.")
    split_fractions: str | None = setting(
        None, EPISODE, "Shares of train, val and test among a folder's classes. Default: 64-16-20."
    )
    strict: bool = setting(
        False, EPISODE, "Refuse a folder with unreadable images or too small classes; else they are left out."
    )
    rotations: Rotations | None = setting(
        None, EPISODE, "Quarter turns of training classes: one a task, new classes, or none."
    )
    augment: Augment | None = setting(
        None,
        EPISODE,
        "Random changes of every training image: mirrored, shifted by up to an eighth, both, or none.",
    )
    ink: Literal[0, 1] | None = setting(
        None, EPISODE, "Value of ink (black); paper has the other. Default: 1 for characters."
    )
    normalize: Normalize | None = setting(
        None,
        EPISODE,
        "Shift and scale colours by ImageNet's mean and deviation. Default: sets of colour images.",
    )
    image_size: int | None = setting(
        None, EPISODE, "Pixels of a side. Default: the data set's; 84 for a folder.", least=4, below=1025
    )
    channels: Literal[1, 3] | None = setting(
        None, EPISODE, "1 (grey) or 3 (colour). Default: the data set's; 3 for a folder."
    )
    resize: str | None = setting(None, EPISODE, "Filter that shrinks the originals.")

    net: NetName = setting("conv4", NETWORK, "Network.")
    filters: int = setting(
        64, NETWORK, "Filters of every convolution; of the first block with resnet12.", least=1
    )
    hidden: str | None = setting(
        None, NETWORK, "Widths of mlp's layers. Default: 256-128-64-64 for images, 40-40 for curves."
    )
    pooling: Pooling | None = setting(
        None, NETWORK, "How conv4 halves its maps: max-pool, or stride 2. Default: max."
    )
    readout: Readout | None = setting(
        None, NETWORK, "What conv4's head reads: all places, or their mean. Default: flatten."
    )
    activation: Activation | None = setting(
        None, NETWORK, "Of conv4 and mlp. Default: leaky_relu in conv4, relu in mlp."
    )

    algo: str = setting("maml++", INNER, "Algorithm.")
    adapts: Adapts = setting("all", INNER, "What the inner loop changes.")
    inner_steps: int = setting(5, INNER, "Gradient steps on the support set in training.", least=0)
    eval_inner_steps: int | None = setting(
        None,
        INNER,
        "The same in evaluation; later steps reuse the last step's rates and norms. Default: as in training.",
        least=0,
    )
    inner_lr: float = setting(
        0.1, INNER, "Inner learning rate; with --lslr its starting value.", above=0, below=LARGEST
    )
    inner_optimizer: InnerOptimizer | None = setting(
        None, INNER, "Rule of the inner steps; adam has beta1 = 0."
    )
    inner_batch: int | None = setting(
        None, INNER, "Support examples of every inner step in training. Default: all.", least=1
    )
    eval_inner_batch: int | None = setting(None, INNER, "The same in evaluation. Default: all.", least=1)
    proximal: float | None = setting(
        None, INNER, "Strength of the pull towards the initialisation.", above=0, below=LARGEST
    )
    first_order: bool = setting(False, INNER, "Do not differentiate the inner gradients.")
    bn: BatchNorm = setting(
        "transductive",
        INNER,
        "Batch norm of queries in evaluation: their own statistics, those kept in training, "
        "or the support set's.",
    )

    meta_lr: float = setting(0.001, OUTER, "Meta learning rate.", above=0, below=LARGEST)
    meta_lr_final: float | None = setting(
        None, OUTER, "Where the meta learning rate ends, in a straight line. Default: it stays.", least=0
    )
    hyper_lr: float | None = setting(
        None, OUTER, "Step of the logarithms of both learning rates.", above=0, below=LARGEST
    )
    cg_steps: int | None = setting(None, OUTER, "Steps of conjugate gradient.", least=1)
    meta_batch_size: int = setting(8, OUTER, "Tasks per meta-step.", least=1, below=MOST_TASKS)
    epochs: int = setting(
        100, OUTER, "Epochs; a unit of schedules and validation, not a pass over data.", least=1
    )
    steps_per_epoch: int = setting(500, OUTER, "Meta-steps per epoch.", least=1)
    val_tasks: int = setting(600, OUTER, "Fixed validation tasks after every epoch.", least=2)
    adam_beta1: float = setting(0.9, OUTER, "Adam's decay of the first moment.", least=0, below=1)
    adam_beta2: float = setting(0.999, OUTER, "Adam's decay of the second moment.", least=0, below=1)
    clip_value: float | None = setting(
        None,
        OUTER,
        "Clamp every element of the network's meta-gradient to ± this; learnt rates are left alone.",
        above=0,
    )
    clip_norm: float | None = setting(
        None, OUTER, "Scale the whole meta-gradient down to this norm.", above=0
    )

    msl: bool = improvement(
        "Multi-step loss: query loss after every inner step, weight moving to the last.",
        # The published configurations have it for 10 of 100 epochs.
        companions={"msl_epochs": lambda config: max(1, round(config.epochs / 10))},
        unsupported_by=("no unrolled loop",),
    )
    msl_epochs: int | None = setting(
        None,
        MAMLPP,
        "Epochs until the last step has all the weight. Default: a tenth of the epochs.",
        least=1,
    )
    da: bool = improvement(
        "Derivative-order annealing: first order at first, second order after --da-epochs.",
        companions={"da_epochs": lambda config: round(config.epochs / 3)},  # 50 of 150 in the paper
        unsupported_by=("no unrolled loop",),
    )
    da_epochs: int | None = setting(
        None, MAMLPP, "Epochs in first order. Default: a third of the epochs.", least=0
    )
    # The paper describes statistics and weights of batch norm as one improvement (section 4); apart, only the
    # weights matter where queries are normalised by their own statistics.
    bnrs: bool = improvement(
        "Batch-norm running statistics kept for each inner step (used by --bn running).",
        unsupported_by=("no unrolled loop", "one pass of the body", "no batch norm"),
        paper_group="batch norm",
        read_by_bn="running",
    )
    bnwb: bool = improvement(
        "Batch-norm weight and bias learnt for each inner step.",
        unsupported_by=("no unrolled loop", "one pass of the body", "no batch norm"),
        paper_group="batch norm",
    )
    lslr: bool = improvement(
        "Inner learning rate learnt for each layer and inner step.",
        unsupported_by=("no unrolled loop", "own inner rates"),
    )
    ca: bool = improvement(
        "Cosine annealing of the meta learning rate to --min-meta-lr.",
        companions={"min_meta_lr": lambda config: config.meta_lr / 100},
        unsupported_by=("own meta learning rate",),
    )
    min_meta_lr: float | None = setting(
        None, MAMLPP, "Where --ca ends. Default: a hundredth of --meta-lr.", least=0
    )

    device: str = setting(
        "auto",
        HARDWARE,
        "auto, cpu, cuda or cuda:N; auto takes a CUDA device if there is one.",
        decides=False,
    )
    precision: Precision = setting(
        "auto",
        HARDWARE,
        "Arithmetic of convolutions; everything else is float32 (float64: all). auto: tf32 on a CUDA device, "
        "float32 on a CPU.",
    )
    engine: EngineName = setting(
        "adjoint",
        HARDWARE,
        "How meta-gradients are computed: adjoint, or plain double backward, which it is held to.",
    )
    task_chunk: str = setting(
        "auto", HARDWARE, "Tasks per pass, less memory for the same result: a number, or auto.", decides=False
    )
    cuda_graph: bool | None = setting(
        None, HARDWARE, "Replay meta-steps as CUDA graphs. Default: on a CUDA device.", decides=False
    )
    data_root: str | None = setting(
        None, HARDWARE, "Folder of prepared data sets. Default: the platform's cache folder.", decides=False
    )
    seed: int = setting(0, HARDWARE, "Seed of initial weights and of training tasks.", least=0, below=SEEDS)
    init_seed: int | None = setting(
        None, HARDWARE, "Seed of the initial weights alone.", least=0, below=SEEDS
    )
    train_seed: int | None = setting(
        None, HARDWARE, "Seed of the training tasks alone.", least=0, below=SEEDS
    )
    split_seed: int = setting(0, HARDWARE, "Seed of the class split.", least=0, below=SEEDS)
    eval_seed: int = setting(0, HARDWARE, "Seed of the validation and test tasks.", least=0, below=SEEDS)

    report_every: int = setting(5, OUTPUT, "Meta-steps between reports.", least=1, decides=False)

    @property
    def total_steps(self) -> int:
        """Meta-steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def improvements(self) -> tuple[str, ...]:
        """The improvements of MAML++ that are on, in the paper's order."""
        return tuple(name for name in IMPROVEMENTS if getattr(self, name))

    @property
    def evaluation_inner_steps(self) -> int:
        """Inner steps of validation and of tests."""
        return self.inner_steps if self.eval_inner_steps is None else self.eval_inner_steps


@dataclass(frozen=True)
class EvalConfig:
    """How a trained run is evaluated. `None` means: as the run was trained."""

    split: Split = setting("test", EPISODE, "Class split to draw tasks from.")
    tasks: int = setting(600, EPISODE, "Tasks.", least=2)
    queries: int | None = setting(
        None, EPISODE, "Query examples per class. Default: as in training.", least=1
    )
    disjoint: bool = setting(False, EPISODE, "Reuse no image in another task, as far as the split allows.")
    label_permutations: int = setting(
        1, EPISODE, "Orders of its labels that each task is judged under; its scores are averaged.", least=1
    )
    dataset: str | None = setting(
        None, EPISODE, "Test on another data set, its images brought to the run's shape. Default: the run's."
    )
    eval_seed: int | None = setting(
        None, EPISODE, "Seed of the task list. Default: the run's.", least=0, below=SEEDS
    )
    adapts: Adapts | None = setting(None, INNER, "What the inner loop changes. Default: the run's.")
    inner_steps: int | None = setting(
        None, INNER, "Gradient steps on the support set. Default: the run's.", least=0
    )
    inner_lr: float | None = setting(
        None, INNER, "Inner learning rate, unless it was learnt. Default: the run's.", above=0, below=LARGEST
    )
    bn: BatchNorm | None = setting(
        None,
        INNER,
        "Batch norm of queries: their own statistics, those kept in training, or the support set's. Default: "
        "the run's.",
    )
    device: str = setting(
        "auto",
        HARDWARE,
        "auto, cpu, cuda or cuda:N; auto takes a CUDA device if there is one.",
        decides=False,
    )
    data_root: str | None = setting(
        None, HARDWARE, "Folder of prepared data sets. Default: the run's.", decides=False
    )

    def over(self, trained: TrainConfig) -> TrainConfig:
        """A run's settings with those that this evaluation replaces."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name in FIELDS}
        values["eval_inner_steps"] = values.pop("inner_steps")
        return replace(trained, **{name: value for name, value in values.items() if value is not None})


FIELDS = {item.name: item for item in fields(TrainConfig)}

# In the paper's order (section 4), which is that of the fields.
IMPROVEMENTS: Mapping[str, Improvement] = {
    name: replace(record, name=name, paper_group=record.paper_group or name)
    for name, item in FIELDS.items()
    if (record := item.metadata.get("improvement"))
}


def improvements_without_meaning(*obstacles: Obstacle) -> tuple[str, ...]:
    """The improvements that have no meaning where one of these holds."""
    return tuple(
        name
        for name, improvement in IMPROVEMENTS.items()
        if not set(obstacles).isdisjoint(improvement.unsupported_by)
    )

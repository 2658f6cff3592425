"""The schema of the training settings: one flat dataclass.

The settings of data and of policies are inherited from `data_settings.py` and `policy_settings.py`. A field's
name is also its flag, its key in presets and in `config.yaml`, and its table column. Defaults are written
only in these files; the rules that fields must satisfy are in `rules.py`.
"""

# ruff: noqa: RUF009 - every default here is a field of a frozen dataclass

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from mamlctl.core.literals import (
    Activation,
    Adapts,
    BatchNorm,
    ConvName,
    EngineName,
    InnerOptimizer,
    Obstacle,
    Pooling,
    Precision,
    Readout,
)
from mamlctl.settings.fields import (
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
from mamlctl.settings.policy_settings import PolicySettings


@dataclass(frozen=True)
class TrainConfig(PolicySettings):
    """All settings of a training run. `None`: derived by `fill_schedules` or from the data set."""

    net: str = setting("conv4", NETWORK, "Network: a name, or net.py:make for your own one.", common=True)
    head: str | None = setting(None, NETWORK, "Head of your own network (default: its last linear layer).")
    init: str | None = setting(
        None,
        NETWORK,
        "Start from these weights: a .pt, .pth or .safetensors file, a run, or the name of a model.",
    )
    init_skip: str | None = setting(
        None, NETWORK, "With --init: tensors that it leaves as drawn, e.g. head or head,layer4.*."
    )
    loss: str | None = setting(
        None,
        NETWORK,
        "Loss of both loops: cross_entropy, mse, mae, huber, or loss.py:fn for your own one "
        "(default: cross_entropy for images, mse for regression).",
    )
    filters: int = setting(
        64, NETWORK, "Filters per convolution; with resnet12, filters of its first block.", least=1
    )
    hidden: str | None = setting(
        None,
        NETWORK,
        "Layer widths of mlp (default: 256-128-64-64 for images, 40-40 for curves, 100-100 for policies).",
    )
    pooling: Pooling | None = setting(
        None, NETWORK, "How conv4 halves its feature maps: max pooling or stride 2 (default: max)."
    )
    readout: Readout | None = setting(
        None, NETWORK, "What the head of conv4 reads: all positions, or their mean (default: flatten)."
    )
    activation: Activation | None = setting(
        None, NETWORK, "Activation of conv4 and mlp (default: leaky_relu in conv4, relu in mlp)."
    )

    algo: str = setting("maml++", INNER, "Meta-learning algorithm; see docs/algorithms.md.", common=True)
    adapts: Adapts = setting("all", INNER, "Layers that the inner loop changes.")
    inner_steps: int = setting(5, INNER, "Gradient steps per task in training.", common=True, least=0)
    eval_inner_steps: int | None = setting(
        None,
        INNER,
        "Inner steps in evaluation; extra ones reuse the last step's learnt values (default: --inner-steps).",
        least=0,
    )
    inner_lr: float = setting(
        0.1,
        INNER,
        "Inner learning rate; with --lslr, its initial value.",
        common=True,
        above=0,
        below=LARGEST,
    )
    inner_optimizer: InnerOptimizer | None = setting(
        None, INNER, "With reptile: optimiser of the inner loop; adam has beta1 = 0."
    )
    inner_batch: int | None = setting(
        None, INNER, "With reptile: support examples per inner step in training.", least=1
    )
    eval_inner_batch: int | None = setting(
        None, INNER, "With reptile: support examples per inner step in evaluation (default: all).", least=1
    )
    proximal: float | None = setting(
        None, INNER, "With imaml: strength of the pull towards the initialisation.", above=0, below=LARGEST
    )
    first_order: bool = setting(
        False, INNER, "Treat inner gradients as constants, without second derivatives."
    )
    bn: BatchNorm = setting(
        "transductive",
        INNER,
        "Batch-norm statistics for queries in evaluation: the queries' own, those kept in training, "
        "or the support set's.",
    )

    meta_lr: float = setting(
        0.001, OUTER, "Meta learning rate (outer step).", common=True, above=0, below=LARGEST
    )
    meta_lr_final: float | None = setting(
        None, OUTER, "Meta learning rate at the end of a linear schedule (default: no schedule).", least=0
    )
    hyper_lr: float | None = setting(
        None, OUTER, "With alpha-maml: step size for the logarithms of both rates.", above=0, below=LARGEST
    )
    cg_steps: int | None = setting(
        None, OUTER, "With imaml: conjugate-gradient steps per meta-step.", least=1
    )
    freeze: str | None = setting(
        None, OUTER, "Tensors that meta-training leaves as they are, e.g. body or layer1.*,bn1."
    )
    meta_batch_size: int = setting(8, OUTER, "Tasks per meta-step.", common=True, least=1, below=MOST_TASKS)
    epochs: int = setting(
        100, OUTER, "Epochs, each of --steps-per-epoch meta-steps and one validation.", common=True, least=1
    )
    steps_per_epoch: int = setting(500, OUTER, "Meta-steps per epoch.", common=True, least=1)
    body_epochs: int = setting(
        0,
        OUTER,
        "Epochs at the start that train only the body, on all classes of a meta-batch at once.",
        least=0,
    )
    val_tasks: int = setting(600, OUTER, "Validation tasks, the same ones after every epoch.", least=2)
    adam_beta1: float = setting(0.9, OUTER, "Decay rate of Adam's first moment.", least=0, below=1)
    adam_beta2: float = setting(0.999, OUTER, "Decay rate of Adam's second moment.", least=0, below=1)
    clip_value: float | None = setting(
        None,
        OUTER,
        "Clamp each element of the network's meta-gradient to ± this; learnt rates are not clamped.",
        above=0,
    )
    clip_norm: float | None = setting(
        None, OUTER, "Scale the whole meta-gradient down to this norm.", above=0
    )

    msl: bool = improvement(
        "Multi-step loss: query loss after every inner step, with weight moving to the last.",
        # The published configurations use it for 10 of 100 epochs.
        companions={"msl_epochs": lambda config: max(1, round(config.epochs / 10))},
        unsupported_by=("no unrolled loop",),
    )
    msl_epochs: int | None = setting(
        None,
        MAMLPP,
        "Epochs over which the weight moves to the last inner step (default: a tenth of --epochs).",
        least=1,
    )
    da: bool = improvement(
        "Derivative-order annealing: first order until --da-epochs, second order after.",
        companions={"da_epochs": lambda config: round(config.epochs / 3)},  # 50 of 150 in the paper
        unsupported_by=("no unrolled loop",),
    )
    da_epochs: int | None = setting(
        None, MAMLPP, "Epochs in first order (default: a third of --epochs).", least=0
    )
    # The paper describes batch-norm statistics and weights as a single improvement (section 4). Here they are
    # two, since only the weights matter if queries are normalised with their own statistics.
    bnrs: bool = improvement(
        "Separate batch-norm running statistics for each inner step (used with --bn running).",
        unsupported_by=("no unrolled loop", "one pass of the body", "no batch norm"),
        paper_group="batch norm",
        read_by_bn="running",
    )
    bnwb: bool = improvement(
        "Separate learnt batch-norm weights and biases for each inner step.",
        unsupported_by=("no unrolled loop", "one pass of the body", "no batch norm"),
        paper_group="batch norm",
    )
    lslr: bool = improvement(
        "Learnt inner rates, one per layer and inner step.",
        unsupported_by=("no unrolled loop", "own inner rates"),
    )
    ca: bool = improvement(
        "Cosine annealing of the meta learning rate to --min-meta-lr.",
        companions={"min_meta_lr": lambda config: config.meta_lr / 100},
        unsupported_by=("own meta learning rate",),
    )
    min_meta_lr: float | None = setting(
        None, MAMLPP, "Meta learning rate at the end of --ca (default: a hundredth of --meta-lr).", least=0
    )

    device: str = setting(
        "auto",
        HARDWARE,
        "Device: cpu, cuda, cuda:N, or auto (CUDA if there is one).",
        decides=False,
        common=True,
        variable=True,
    )
    precision: Precision = setting(
        "auto",
        HARDWARE,
        "Arithmetic of convolutions (float64: of everything); auto is tf32 on a CUDA device, else float32.",
    )
    engine: EngineName = setting(
        "adjoint",
        HARDWARE,
        "How meta-gradients are computed: adjoint (fast), compiled (in C, for curves), or plain (double "
        "backward, the reference).",
    )
    conv: ConvName = setting(
        "auto",
        HARDWARE,
        "Convolutions of conv4 on a CPU: direct, winograd (fewer products), or auto (winograd in float32).",
        before="direct",
        decides=False,
    )
    task_chunk: str = setting(
        "auto", HARDWARE, "Tasks computed at once, a number or auto; fewer take less memory.", decides=False
    )
    cuda_graph: bool | None = setting(
        None, HARDWARE, "Replay meta-steps as CUDA graphs (default: on a CUDA device).", decides=False
    )
    data_root: str | None = setting(
        None,
        HARDWARE,
        "Folder of prepared data sets (default: the platform's cache folder).",
        decides=False,
        variable=True,
    )
    seed: int = setting(
        0, HARDWARE, "Seed of the initial weights and the training tasks.", common=True, least=0, below=SEEDS
    )
    init_seed: int | None = setting(
        None, HARDWARE, "Seed of the initial weights only (default: --seed).", least=0, below=SEEDS
    )
    train_seed: int | None = setting(
        None, HARDWARE, "Seed of the training tasks only (default: --seed).", least=0, below=SEEDS
    )
    split_seed: int = setting(
        0, HARDWARE, "Seed of the split of classes, or of a table's tasks.", least=0, below=SEEDS
    )
    eval_seed: int = setting(0, HARDWARE, "Seed of the validation and test tasks.", least=0, below=SEEDS)

    report_every: int = setting(5, OUTPUT, "Meta-steps between reports.", least=1, decides=False)
    checkpoint_every: str = setting(
        "5m",
        OUTPUT,
        "Longest time between checkpoints; there is also one per epoch, e.g. 90s, 9m or 1h30m.",
        decides=False,
    )

    @property
    def total_steps(self) -> int:
        """Meta-steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def trains_body_only(self, epoch: int) -> bool:
        """Whether the meta-steps of an epoch, counted from 0, train only the body."""
        return epoch < self.body_epochs

    @property
    def improvements(self) -> tuple[str, ...]:
        """The improvements of MAML++ that are on, in the paper's order."""
        return tuple(name for name in IMPROVEMENTS if getattr(self, name))

    @property
    def evaluation_inner_steps(self) -> int:
        """Inner steps in validation and in tests."""
        return self.inner_steps if self.eval_inner_steps is None else self.eval_inner_steps


FIELDS = {item.name: item for item in fields(TrainConfig)}

# In the paper's order (section 4), which is the order of the fields.
IMPROVEMENTS: Mapping[str, Improvement] = {
    name: replace(record, name=name, paper_group=record.paper_group or name)
    for name, item in FIELDS.items()
    if (record := item.metadata.get("improvement"))
}


def improvements_without_meaning(*obstacles: Obstacle) -> tuple[str, ...]:
    """The improvements that have no meaning if there is one of these obstacles."""
    return tuple(
        name for name, entry in IMPROVEMENTS.items() if not set(obstacles).isdisjoint(entry.unsupported_by)
    )

"""Settings: one flat dataclass, and the rules that its fields keep alone and with each other.

A field's name is its flag, its preset key, its `config.yaml` key and its table column;
its default stands here only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

Problem = tuple[str, str]  # the fact, the way out

SEEDS = 2**63  # seeds are below it: half of a 64-bit word, which every generator here takes
LARGEST = 1e38  # float32 holds no larger number
MOST_TASKS = 100_001  # per meta-step: beyond this a slip of the finger is likelier than a wish

EPISODE, INNER, OUTER = "Episode", "Inner loop", "Meta-optimiser"
MAMLPP, HARDWARE, OUTPUT = "MAML++", "Hardware", "Output"


def setting(
    default: Any,
    panel: str,
    text: str,
    *,
    choices: Sequence[object] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with the words and the limits that help, checks and completion share."""
    limits = {"choices": tuple(choices), "least": least, "above": above, "below": below}
    return field(default=default, metadata={"panel": panel, "help": text, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training run. `None` means: derived, by `derive` or by the data set."""

    dataset: str = setting("omniglot", EPISODE, "Data set to draw tasks from: omniglot or glyphs.")
    ways: int = setting(5, EPISODE, "Classes per task.", least=2)
    shots: int = setting(1, EPISODE, "Support examples per class.", least=1)
    queries: int = setting(1, EPISODE, "Query examples per class.", least=1)
    split_scheme: str | None = setting(
        None,
        EPISODE,
        "How classes are split into train, val and test (omniglot: maml++, vinyals, lake).",
    )
    rotations: str | None = setting(
        None,
        EPISODE,
        "Quarter turns of training classes: one a task, new classes, or none.",
        choices=("augment", "classes", "none"),
    )
    ink: int = setting(1, EPISODE, "Value of ink; paper has the other one.", choices=(0, 1))
    resize: str | None = setting(
        None,
        EPISODE,
        "Filter that shrinks the originals (omniglot: bilinear, bicubic, lanczos, box, nearest).",
    )

    algo: str = setting("maml++", INNER, "Algorithm: maml, fomaml or maml++.")
    net: str = setting("conv4", INNER, "Network.", choices=("conv4",))
    filters: int = setting(64, INNER, "Filters of every convolution.", least=1)
    inner_steps: int = setting(5, INNER, "Gradient steps on the support set in training.", least=1)
    eval_inner_steps: int | None = setting(
        None,
        INNER,
        "The same in evaluation; later steps reuse the last step's rates and norms. Default: as in training.",
        least=1,
    )
    inner_lr: float = setting(
        0.1, INNER, "Inner learning rate; with --lslr its starting value.", above=0, below=LARGEST
    )
    first_order: bool = setting(False, INNER, "Do not differentiate the inner gradients.")
    bn: str = setting(
        "transductive",
        INNER,
        "Batch norm of queries in evaluation: their own statistics, those kept in training, "
        "or the support set's.",
        choices=("transductive", "running", "support"),
    )

    meta_lr: float = setting(0.001, OUTER, "Meta learning rate (Adam).", above=0, below=LARGEST)
    meta_batch_size: int = setting(8, OUTER, "Tasks per meta-step.", least=1, below=MOST_TASKS)
    epochs: int = setting(
        100,
        OUTER,
        "Epochs; a unit of schedules and validation, not a pass over data.",
        least=1,
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
        None,
        OUTER,
        "Scale the whole meta-gradient down to this norm.",
        above=0,
    )

    msl: bool = setting(
        False,
        MAMLPP,
        "Multi-step loss: query loss after every inner step, weight moving to the last.",
    )
    msl_epochs: int | None = setting(
        None,
        MAMLPP,
        "Epochs until the last step has all the weight. Default: a tenth of the epochs.",
        least=1,
    )
    da: bool = setting(
        False,
        MAMLPP,
        "Derivative-order annealing: first order at first, second order after --da-epochs.",
    )
    da_epochs: int | None = setting(
        None,
        MAMLPP,
        "Epochs in first order. Default: a third of the epochs.",
        least=0,
    )
    bnrs: bool = setting(
        False,
        MAMLPP,
        "Batch-norm running statistics kept for each inner step (used by --bn running).",
    )
    bnwb: bool = setting(False, MAMLPP, "Batch-norm weight and bias learnt for each inner step.")
    lslr: bool = setting(False, MAMLPP, "Inner learning rate learnt for each layer and inner step.")
    ca: bool = setting(False, MAMLPP, "Cosine annealing of the meta learning rate to --min-meta-lr.")
    min_meta_lr: float | None = setting(
        None,
        MAMLPP,
        "Where --ca ends. Default: a hundredth of --meta-lr.",
        least=0,
    )

    device: str = setting(
        "auto",
        HARDWARE,
        "auto, cpu, cuda or cuda:N; auto takes a CUDA device if there is one.",
    )
    precision: str = setting(
        "auto",
        HARDWARE,
        "Arithmetic of convolutions; everything else is float32 (float64: all). auto: tf32 on a CUDA device, "
        "float32 on a CPU.",
        choices=("auto", "float32", "tf32", "bf16", "float64"),
    )
    engine: str = setting(
        "adjoint",
        HARDWARE,
        "How meta-gradients are computed: adjoint, or plain double backward, which it is held to.",
        choices=("adjoint", "plain"),
    )
    task_chunk: str = setting(
        "auto",
        HARDWARE,
        "Tasks per pass, less memory for the same result: a number, or auto.",
    )
    cuda_graph: bool | None = setting(
        None, HARDWARE, "Replay meta-steps as CUDA graphs. Default: on a CUDA device."
    )
    data_root: str | None = setting(
        None,
        HARDWARE,
        "Folder of prepared data sets. Default: the platform's cache folder.",
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

    report_every: int = setting(5, OUTPUT, "Meta-steps between reports.", least=1)

    @property
    def total_steps(self) -> int:
        """Meta-steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def improvements(self) -> tuple[str, ...]:
        """The MAML++ letters that are on, in the paper's order."""
        return tuple(name for name in IMPROVEMENTS if getattr(self, name))


@dataclass(frozen=True)
class EvalConfig:
    """How a trained run is judged. `None` means: as the run was trained."""

    split: str = setting("test", EPISODE, "Class split to draw tasks from.", choices=("test", "val", "train"))
    tasks: int = setting(600, EPISODE, "Tasks.", least=2)
    queries: int | None = setting(
        None,
        EPISODE,
        "Query examples per class. Default: as in training.",
        least=1,
    )
    eval_seed: int | None = setting(
        None, EPISODE, "Seed of the task list. Default: the run's.", least=0, below=SEEDS
    )
    inner_steps: int | None = setting(
        None,
        INNER,
        "Gradient steps on the support set. Default: the run's.",
        least=1,
    )
    bn: str | None = setting(
        None,
        INNER,
        "Batch norm of queries: their own statistics, those kept in training, or the support set's. Default: "
        "the run's.",
        choices=("transductive", "running", "support"),
    )
    device: str = setting(
        "auto",
        HARDWARE,
        "auto, cpu, cuda or cuda:N; auto takes a CUDA device if there is one.",
    )
    data_root: str | None = setting(None, HARDWARE, "Folder of prepared data sets. Default: the run's.")


IMPROVEMENTS = ("msl", "da", "bnrs", "bnwb", "lslr", "ca")
FIELDS = {item.name: item for item in fields(TrainConfig)}
# A setting that only its switch gives a meaning to.
NEEDS = {"msl_epochs": "msl", "da_epochs": "da", "min_meta_lr": "ca"}


def flag(name: str) -> str:
    """The command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Iterable[str], *, otherwise: str) -> str:
    """A hint that names the known word closest to `word`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else otherwise


def check(config: TrainConfig) -> list[Problem]:
    """Every rule that the settings break, by themselves and with each other."""
    problems = limit_problems(config)
    for name, switch in NEEDS.items():
        if getattr(config, name) is not None and not getattr(config, switch):
            problems.append(
                (f"{flag(name)} has no effect without {flag(switch)}", f"add {flag(switch)} or leave it out")
            )
    if config.msl and config.inner_steps < 2:
        problems.append(
            (f"--msl weighs several inner steps, but --inner-steps is {config.inner_steps}", "add --no-msl")
        )
    if config.da and config.first_order:
        problems.append(
            ("--da has no effect with --first-order: there is no second order to come", "leave one out")
        )
    if config.clip_value is not None and config.clip_norm is not None:
        problems.append(("--clip-value and --clip-norm are both given", "leave one out"))
    if config.min_meta_lr is not None and config.min_meta_lr > config.meta_lr:
        problems.append(
            (f"--min-meta-lr {config.min_meta_lr:g} is above --meta-lr {config.meta_lr:g}", "lower it")
        )
    if config.task_chunk != "auto" and not (config.task_chunk.isdecimal() and int(config.task_chunk)):
        problems.append(
            (f"--task-chunk is {config.task_chunk!r}", "use auto, or a number of tasks from 1 on")
        )
    if config.da_epochs is not None and config.da_epochs > config.epochs:
        problems.append(
            (f"--da-epochs {config.da_epochs} is more than --epochs {config.epochs}", "use --first-order")
        )
    return problems


def limit_problems(config: TrainConfig | EvalConfig) -> list[Problem]:
    """The limits of single fields that the settings break."""
    found = (_problem_of_limits(item, getattr(config, item.name)) for item in fields(config))
    return [problem for problem in found if problem]


def _problem_of_limits(item: Field[Any], value: Any) -> Problem | None:
    name, limits = item.name, item.metadata
    if value is None:
        return None
    if limits["choices"] and value not in limits["choices"]:
        words = ", ".join(str(choice) for choice in limits["choices"])
        return f"{flag(name)} is {value!r}, but it can only be one of {words}", nearest(
            str(value), [str(choice) for choice in limits["choices"]], otherwise=f"use one of {words}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return f"{flag(name)} is {value}, which is not a finite number", "use a finite number"
    if limits["least"] is not None and value < limits["least"]:
        return (
            f"{flag(name)} is {value}, but the least is {limits['least']}",
            f"use {limits['least']} or more",
        )
    if limits["above"] is not None and value <= limits["above"]:
        return (
            f"{flag(name)} is {value}, but it must be above {limits['above']}",
            f"use more than {limits['above']}",
        )
    if limits["below"] is not None and value >= limits["below"]:
        return (
            f"{flag(name)} is {value}, but it must be below {limits['below']}",
            f"use less than {limits['below']}",
        )
    return None


def derive(config: TrainConfig, data_set_defaults: Mapping[str, Any]) -> TrainConfig:
    """Fill what was left open: schedules from the epochs, so that short runs keep their shape.

    The paper's runs have MSL for 10 of 100 epochs (published configurations) and DA for 50 of 150.
    """
    open_values: dict[str, Any] = {
        **data_set_defaults,
        "eval_inner_steps": config.inner_steps,
        "init_seed": config.seed,
        "train_seed": config.seed,
    }
    if config.msl:
        open_values["msl_epochs"] = max(1, round(config.epochs / 10))
    if config.da:
        open_values["da_epochs"] = round(config.epochs / 3)
    if config.ca:
        open_values["min_meta_lr"] = config.meta_lr / 100
    return replace(
        config, **{key: value for key, value in open_values.items() if getattr(config, key) is None}
    )

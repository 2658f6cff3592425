"""The definition of an algorithm: a record, whose functions import torch when they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mamlctl.core.literals import Adapts, Classifier
from mamlctl.core.problems import Problem
from mamlctl.settings.schema import TrainConfig, improvements_without_meaning

if TYPE_CHECKING:
    from torch import Tensor

    from mamlctl.engine.algorithms.meta_gradient import Outer
    from mamlctl.engine.evaluation.prediction import Predict
    from mamlctl.engine.inner_loop import InnerRule
    from mamlctl.engine.optimizers import Optimizer


def adam_optimizer(learnable: Mapping[str, Tensor], config: TrainConfig) -> Optimizer:
    from mamlctl.engine.algorithms.compiled_mlp import adam
    from mamlctl.engine.optimizers import Adam

    kind = adam if config.engine == "compiled" else Adam
    return kind(learnable, config.meta_lr, (config.adam_beta1, config.adam_beta2))


def sgd_optimizer(learnable: Mapping[str, Tensor], config: TrainConfig) -> Optimizer:
    from mamlctl.engine.optimizers import Sgd

    return Sgd(learnable, config.meta_lr)


def inner_rule(config: TrainConfig) -> InnerRule:
    """The update rule of a run's inner steps."""
    from mamlctl.engine.inner_loop import InnerRule

    return InnerRule(config.proximal, config.inner_optimizer)


@dataclass(frozen=True)
class Algorithm:
    """The definition of an algorithm: what it learns and adapts, how, and which settings it has."""

    summary: str  # paper and main idea
    outer: Callable[[TrainConfig], Outer]  # the meta-gradient
    optimizer: Callable[[Mapping[str, Tensor], TrainConfig], Optimizer] = adam_optimizer
    # One inner rate for each tensor, for each weight, or one that all tensors share.
    inner_rates: Literal["tensor", "weight", "shared"] = "tensor"
    # Outputs of the network in training: the classes of a task, all training classes, or no head.
    training_head: Literal["ways", "classes", "none"] = "ways"
    head_start: Literal["own rows", "equal rows", "zeros"] = "own rows"  # of the classes in the inner loop
    classifier: Classifier = "head"
    adapts_norm: bool = False  # whether the inner loop adapts batch norm's weights and biases
    whole_batches: bool = False  # whether a meta-batch is one batch of examples, which must not be divided
    in_one_pass: bool = False  # whether a process computes its tasks together; several may share a meta-batch
    on_curves: Mapping[str, Any] | None = field(default_factory=dict)  # defaults there; None: needs classes
    # How it learns policies, for data sets with rewards; or why it does not, and the hint of the error.
    on_rewards: Algorithm | Problem = ("needs examples", "use --algo maml")
    needs_rewards: bool = False  # whether it is only for data sets with rewards
    sees_goal: bool = False  # whether a state of its policies contains the goal
    predictor: Callable[[TrainConfig], Predict] | None = None  # of policies; None: see `classifier`
    unrolls: bool = False  # whether the inner loop is differentiated, in first or second order
    implicit: bool = False  # whether the end of the inner loop is, which takes Hessian-vector products
    start: Literal["meta-learnt", "pre-trained", "random start"] = "meta-learnt"  # origin of its weights
    may_adapt: tuple[Adapts, ...] = ("all", "head", "body")  # possible values of --adapts
    captured: bool = False  # whether its meta-steps can be replayed as CUDA graphs
    improves: str | None = None  # the algorithm that equals this one without the six improvements
    defaults: Mapping[str, Any] = field(default_factory=dict)  # where they differ from the schema's
    forced: Mapping[str, Any] = field(default_factory=dict)  # settings that must have this value
    exclusive_settings: tuple[str, ...] = ()  # settings that only this and a few other algorithms have
    unsupported: Mapping[str, str] = field(default_factory=dict)  # setting -> why it has no effect

    def learns_rates(self, config: TrainConfig) -> bool:
        """Whether the inner learning rates are learnt."""
        return config.lslr or self.inner_rates != "tensor"

    def head_of_zeros(self, config: TrainConfig) -> bool:
        """Whether meta-training starts with a head of zeros, whatever the seed."""
        return self.head_start == "zeros" or config.body_epochs > 0

    def start_of(self, config: TrainConfig) -> str:
        """The origin of a run's weights before they adapt, for people."""
        given = self.start == "random start" and config.init is not None
        return "given start" if given else self.start

    def predict(self, config: TrainConfig) -> Predict:
        """Return the function that adapts to the support sets of tasks and predicts their query sets."""
        if self.predictor is not None:
            return self.predictor(config)
        from mamlctl.engine.algorithms.pretraining import by_neighbours, fine_tuned
        from mamlctl.engine.algorithms.protonet import by_prototypes
        from mamlctl.engine.evaluation.prediction import adapted

        predictions: dict[Classifier, Predict] = {
            "head": partial(adapted, rule=inner_rule(config)),
            "zeros": fine_tuned,
            "prototypes": by_prototypes,
            "neighbours": by_neighbours,
        }
        return predictions[self.classifier]


def refusals(why: str, *names: str) -> dict[str, str]:
    """The settings that have no effect for one reason, with that reason."""
    return dict.fromkeys(names, why)


# Both for examples and for policies.
NO_STEPS: Mapping[str, Any] = {"inner_steps": 0, "eval_inner_steps": 0}
NOTHING_ADAPTED = refusals("nothing is adapted", "inner_lr", "adapts")
NOTHING_TRAINED = refusals(
    "nothing is trained",
    "freeze",
    *improvements_without_meaning("own meta learning rate"),
    "meta_lr",
    "meta_lr_final",
)
OWN_RATES = refusals("it learns a rate per weight already", *improvements_without_meaning("own inner rates"))

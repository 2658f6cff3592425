"""The registry of algorithms: each one is an entry of ALGORITHMS, and no other module knows its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mamlctl.data.sets.registry import has_rewards
from mamlctl.engine.algorithms import policies
from mamlctl.engine.algorithms.algorithm import (
    NO_STEPS,
    NOTHING_ADAPTED,
    NOTHING_TRAINED,
    OWN_RATES,
    Algorithm,
    refusals,
    sgd_optimizer,
)
from mamlctl.settings.schema import IMPROVEMENTS, TrainConfig, improvements_without_meaning

if TYPE_CHECKING:
    from torch import Tensor

    from mamlctl.engine.algorithms.meta_gradient import Outer
    from mamlctl.engine.optimizers import Optimizer

# The functions below import torch code when they are called, so that `mamlctl --help` and the checks of
# settings can read the registry without importing torch.


def _unrolled(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.adjoint import adjoint
    from mamlctl.engine.algorithms.compiled_mlp import compiled
    from mamlctl.engine.algorithms.meta_gradient import unrolled

    if config.engine == "compiled":
        return compiled
    # For a small network the adjoint is slower (9 ms per meta-step against 7, curves, 5 inner steps), and the
    # memory that it saves does not matter.
    return unrolled if config.engine == "plain" or config.net == "mlp" else adjoint


def _equal_head(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.equal_heads import EqualHead

    return EqualHead(_unrolled(config), zeros=ALGORITHMS[config.algo].head_start == "zeros")


def _anil(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.anil import anil
    from mamlctl.engine.algorithms.meta_gradient import unrolled

    return unrolled if config.engine == "plain" else partial(anil, engine=config.engine)


def _imaml(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.imaml import imaml

    assert config.proximal is not None and config.cg_steps is not None
    return partial(imaml, engine=config.engine, proximal=config.proximal, cg_steps=config.cg_steps)


def _reptile(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.reptile import reptile

    assert config.inner_optimizer is not None
    return partial(reptile, engine=config.engine, inner_optimizer=config.inner_optimizer)


def _pretraining(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.pretraining import pretraining

    return partial(pretraining, engine=config.engine)


def _no_training(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.pretraining import no_training

    return no_training


def _protonet(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.protonet import protonet

    return partial(protonet, engine=config.engine)


def _hypergradient(learnable: Mapping[str, Tensor], config: TrainConfig) -> Optimizer:
    from mamlctl.engine.algorithms.alpha_maml import Hypergradient

    assert config.hyper_lr is not None
    betas = config.adam_beta1, config.adam_beta2
    return Hypergradient(learnable, config.meta_lr, betas, config.hyper_lr)


# Settings that have an effect only if the inner loop is differentiated.
OF_UNROLLED = (*improvements_without_meaning("no unrolled loop"), "first_order", "body_epochs")
NO_LOOP = refusals("there is no inner loop in training", *OF_UNROLLED)
FINE_TUNING = {"inner_steps": 0, "eval_inner_steps": 10, "inner_lr": 0.1}

# The meta-gradient of curves is computed in C.
COMPILED_CURVES = {"engine": "compiled"}

# Curves have values up to 5, with which an inner rate of 0.1 diverges.
FINE_TUNING_CURVES = {"inner_lr": 0.01}

ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm(
        "Finn, Abbeel & Levine 2017 (arXiv:1703.03400), second order",
        _unrolled,
        on_rewards=policies.MAML,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        captured=True,
    ),
    "fomaml": Algorithm(
        "first-order MAML",
        _unrolled,
        on_rewards=policies.FOMAML,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        captured=True,
        defaults={"first_order": True},
        forced={"first_order": True},
    ),
    "maml++": Algorithm(
        "Antoniou, Edwards & Storkey 2019 (arXiv:1810.09502): MAML with all six improvements",
        _unrolled,
        on_rewards=policies.MAML_PLUS_PLUS,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        captured=True,
        improves="maml",
        defaults=dict.fromkeys(IMPROVEMENTS, True),
    ),
    "anil": Algorithm(
        "Raghu et al. 2020 (arXiv:1909.09157): the inner loop adapts the head only",
        _anil,
        on_rewards=policies.ADAPTS_HEAD,
        unrolls=True,
        defaults={"adapts": "head"},
        forced={"adapts": "head"},
        unsupported=refusals(
            "the body runs once per task, not once per inner step",
            *improvements_without_meaning("one pass of the body"),
        ),
    ),
    "boil": Algorithm(
        "Oh et al. 2021 (arXiv:2008.08882): the inner loop adapts the body only",
        _unrolled,
        on_rewards=policies.ADAPTS_BODY,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        captured=True,
        defaults={"adapts": "body"},
        forced={"adapts": "body"},
    ),
    "unicorn-maml": Algorithm(
        "Ye & Chao 2022 (arXiv:2106.16245): all classes start from one learnt row of the head",
        _equal_head,
        on_rewards=policies.CLASSES,
        head_start="equal rows",
        on_curves=None,
        unrolls=True,
        captured=True,
    ),
    "maml-zero": Algorithm(
        "Kao et al. 2022 (arXiv:2106.15367): the head is zero before each inner loop",
        _equal_head,
        on_rewards=policies.CLASSES,
        head_start="zeros",
        on_curves=COMPILED_CURVES,
        unrolls=True,
        may_adapt=("all", "head"),  # with a head of zeros the gradient of the body is 0
        captured=True,
    ),
    "meta-sgd": Algorithm(
        "Li et al. 2017 (arXiv:1707.09835): learns one inner rate per weight, of either sign",
        _unrolled,
        on_rewards=policies.META_SGD,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        captured=True,
        inner_rates="weight",
        unsupported=OWN_RATES,
    ),
    "alpha-maml": Algorithm(
        "Behl et al. 2019 (arXiv:1905.07435): learns the inner and the meta learning rate by hypergradients",
        _unrolled,
        on_rewards=policies.NO_GRADIENT,
        on_curves=COMPILED_CURVES,
        unrolls=True,
        optimizer=_hypergradient,
        inner_rates="shared",
        defaults={"hyper_lr": 0.02},
        exclusive_settings=("hyper_lr",),
        unsupported=refusals(
            "both learning rates are learnt by hypergradients",
            *improvements_without_meaning("own inner rates", "own meta learning rate"),
            "meta_lr_final",
        ),
    ),
    "imaml": Algorithm(
        "Rajeswaran et al. 2019 (arXiv:1909.04630): the implicit gradient at the end of the inner loop",
        _imaml,
        on_rewards=policies.NO_MINIMUM,
        # Measured on Omniglot 5-way 1-shot: proximal 1 with inner_lr 0.1 diverges after 200 meta-steps.
        # proximal 2 with inner_lr 0.05 gets worse after 600 meta-steps (84.4 %, then 70.0 % after 1,000), and
        # with inner_lr 0.02 it does not (83.5 %).
        implicit=True,
        defaults={"proximal": 2.0, "cg_steps": 5, "inner_steps": 16, "inner_lr": 0.02},
        exclusive_settings=("proximal", "cg_steps"),
        unsupported=refusals("the implicit gradient uses only the final weights", *OF_UNROLLED),
    ),
    "reptile": Algorithm(
        "Nichol, Achiam & Schulman 2018 (arXiv:1803.02999): interpolates towards the adapted weights",
        _reptile,
        on_rewards=policies.REPTILE,
        optimizer=sgd_optimizer,
        adapts_norm=True,
        defaults={
            "inner_optimizer": "adam",
            "inner_lr": 0.001,
            "inner_steps": 5,
            "inner_batch": 10,
            "eval_inner_steps": 50,
            "train_shots": 10,
            "meta_lr": 1.0,
            "meta_lr_final": 0.0,
            "meta_batch_size": 5,
        },
        exclusive_settings=("inner_optimizer", "inner_batch", "eval_inner_batch"),
        unsupported=refusals("its meta-gradient does not depend on the query loss", *OF_UNROLLED)
        | refusals("its outer step is an interpolation, not Adam", "adam_beta1", "adam_beta2"),
    ),
    "transfer": Algorithm(
        "one classifier pre-trained on all training classes, fine-tuned on each test task",
        _pretraining,
        on_rewards=policies.TRANSFER,
        classifier="zeros",
        training_head="classes",
        adapts_norm=True,
        whole_batches=True,
        start="pre-trained",
        may_adapt=("all", "head"),  # with a head of zeros the gradient of the body is 0
        on_curves=FINE_TUNING_CURVES,
        defaults=FINE_TUNING,
        forced={"inner_steps": 0},
        unsupported=NO_LOOP,
    ),
    "scratch": Algorithm(
        "a random initialisation, fine-tuned on each test task",
        _no_training,
        on_rewards=policies.SCRATCH,
        classifier="zeros",
        adapts_norm=True,
        start="random start",
        may_adapt=("all", "head"),
        on_curves=FINE_TUNING_CURVES,
        defaults=FINE_TUNING | {"epochs": 1, "steps_per_epoch": 1},
        forced={"inner_steps": 0, "epochs": 1, "steps_per_epoch": 1},
        unsupported=NO_LOOP | NOTHING_TRAINED,
    ),
    "protonet": Algorithm(
        "Snell, Swersky & Zemel 2017 (arXiv:1703.05175): the nearest class mean in a learnt feature space",
        _protonet,
        on_rewards=policies.CLASSES,
        classifier="prototypes",
        training_head="none",
        on_curves=None,
        defaults=NO_STEPS,
        forced=NO_STEPS,
        unsupported=NO_LOOP
        | NOTHING_ADAPTED
        | refusals("it is defined by the cross-entropy of negative distances", "loss"),
    ),
    "nearest": Algorithm(
        "the nearest support example in the features of a classifier pre-trained on all training classes",
        _pretraining,
        on_rewards=policies.CLASSES,
        classifier="neighbours",
        training_head="classes",
        on_curves=None,
        whole_batches=True,
        defaults=NO_STEPS,
        forced=NO_STEPS,
        unsupported=NO_LOOP
        | NOTHING_ADAPTED
        | refusals("it compares features of a classifier, whose loss is the cross-entropy", "loss"),
    ),
    "oracle": replace(policies.ORACLE, on_rewards=policies.ORACLE),
}


def algorithm_of(config: TrainConfig) -> Algorithm:
    """The definition of the algorithm for the data of these settings; KeyError for an unknown name."""
    return definition(config.algo, rewards=has_rewards(config))


def definition(name: str, *, rewards: bool) -> Algorithm:
    """The definition of an algorithm: of policies for data with rewards, if it learns them.

    KeyError for an unknown name.
    """
    entry = ALGORITHMS[name]
    return entry.on_rewards if rewards and isinstance(entry.on_rewards, Algorithm) else entry

"""The loss of policies and their inner loop by torch's distributions and double backward, for comparisons."""

from torch import Tensor
from torch.autograd import grad
from torch.distributions import Independent, Normal, kl_divergence

from mamlctl.engine.nets.batch_norm import NormPass
from mamlctl.engine.nets.mlp import DEVIATION
from mamlctl.engine.reinforcement.rollouts import LEAST_LOG


def distributions(policy, fast, x_TED):
    """The distributions of actions in the states of all tasks."""
    mean_TEA = policy(fast, x_TED, NormPass({}, {}, 0))
    deviation_TA = fast[DEVIATION].clamp(min=LEAST_LOG).exp()
    return Independent(Normal(mean_TEA, deviation_TA.unsqueeze(1).expand_as(mean_TEA)), 1)


def drawn(trajectories):
    """The distributions from which actions were drawn."""
    deviation_TA, mean_TEA = trajectories.log_deviation_TA.exp(), trajectories.means
    return Independent(Normal(mean_TEA, deviation_TA.unsqueeze(1).expand_as(mean_TEA)), 1)


def loss(policy, fast, experience) -> Tensor:
    """Minus the mean over states of the likelihood ratio times the advantage, _T."""
    trained = experience.trained
    log_ratio_TE = distributions(policy, fast, trained.states).log_prob(trained.actions)
    log_ratio_TE = log_ratio_TE - drawn(trained).log_prob(trained.actions)
    return -trained.mean_over_times(log_ratio_TE.exp() * experience.advantage_TE)


def divergence(policy, fast, experience) -> Tensor:
    """The mean divergence of the policies from those that drew the actions, _T."""
    trained = experience.trained
    return trained.mean_over_times(kl_divergence(drawn(trained), distributions(policy, fast, trained.states)))


def adapt(policy, state, experiences, *, tasks, first_order):
    """The fast weights after 0, 1, ... inner steps with stored experience, with their graph."""
    fast = {name: part.expand(tasks, *part.shape) for name, part in state.slow.items()}
    yield fast
    for step, experience in enumerate(experiences[:-1]):
        total = loss(policy, fast, experience).sum()
        adapted = [fast[name] for name in state.rates]
        grads = grad(total, adapted, create_graph=not first_order, retain_graph=True)
        fast = state.stepped(fast, dict(zip(state.rates, grads, strict=True)), step)
        yield fast

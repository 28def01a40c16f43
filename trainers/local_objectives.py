"""What a federation adds to a site's gradient: FedProx's pull to the received weights, SCAFFOLD's correction of drift.

Both act on live parameters, just before the optimizer's step and after nnU-Net has unscaled and clipped the gradient of the
site's own loss: g ← g + μ (w - w_received) + (c - c_i).

| here | paper |
|---|---|
| proximal_mu, received | μ, w^t (FedProx); h_i(w) = F_i(w) + μ/2 |w - w^t|² |
| control, own, correction | c, c_i, c - c_i (SCAFFOLD) |

SCAFFOLD's new c_i is the mean of the site's own gradients over the round's steps. With plain SGD at a constant rate η that is the
paper's option II, c_i - c + (x - y_i) / (K η), term by term. The difference of weights would be wrong here: momentum makes it
up to 1 / (1 - β) times the mean gradient and carries the last round in, weight decay and a falling rate change it too. So
gradients are counted, not weights, and the optimizer may be any. The momentum buffer lives on between rounds, as always: at the
common optimum all corrected gradients are zero, so it does not move a site away from there.

References:
    Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, eq. 2 (FedProx).
    Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nnunet_fedharm.errors import FederationError
from nnunet_fedharm.trainers.round_states import RoundStates
from nnunet_fedharm.trainers.weights import unique_tensors

Weights = dict[str, npt.NDArray[Any]]

CONTROL = "control"
"""Kind of the files that keep c_i."""


@dataclass(frozen=True)
class Objective:
    """What one round adds to a site's own loss; the default adds nothing.

    Attributes:
        proximal_mu: FedProx's μ; 0 turns it off.
        control: SCAFFOLD's c by name of tensor; None turns it off.
        counted: last round whose reply of this site the server counted; None before the first.

    Raises:
        FederationError: `counted`, which comes over the network, is no whole number.
    """

    proximal_mu: float = 0.0
    control: Weights | None = None
    counted: int | None = None

    def __post_init__(self) -> None:
        if self.counted is not None and type(self.counted) is not int:
            raise FederationError(f"The last round that was counted is {self.counted!r}; it has to be a whole number.")


class GradientTerms:
    """Hook for `torch.optim.Optimizer.register_step_pre_hook`.

    Args:
        parameters: name -> live parameter, which holds the received value now.
        proximal_mu: μ.
        correction: name -> c - c_i, of the parameters that have one; None does not measure gradients either.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], proximal_mu: float, correction: Mapping[str, Tensor] | None
    ) -> None:
        self.mu = proximal_mu
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.received = {name: value.detach().clone() for name, value in parameters.items()} if proximal_mu else {}
        self.correction = correction
        self.summed: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        self.steps += 1
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self.names.get(id(parameter))
                if name is not None and parameter.grad is not None:
                    self._change(name, parameter, parameter.grad)

    def _change(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        if self.correction is not None and name in self.correction:
            if name in self.summed:
                self.summed[name] += gradient
            else:
                self.summed[name] = gradient.clone()
            gradient += self.correction[name]
        if self.mu:
            gradient.add_(parameter.detach() - self.received[name], alpha=self.mu)

    def mean_gradient(self, name: str) -> Tensor | None:
        """Mean over all steps of the site's own gradient; None where there was none."""
        return self.summed[name] / self.steps if name in self.summed else None


@contextmanager
def extended(
    optimizers: Iterable[torch.optim.Optimizer],
    network: nn.Module,
    local: frozenset[str],
    *,
    proximal_mu: float = 0.0,
    correction: Weights | None = None,
) -> Iterator[GradientTerms | None]:
    """Add the terms inside the block; without any the optimizers are not touched.

    Args:
        optimizers: of the round.
        network: holds the received weights.
        local: tensors that this site keeps for itself: nothing was received that they could be pulled to.
        proximal_mu: μ.
        correction: name -> c - c_i.
    """
    if not proximal_mu and correction is None:
        yield None
        return
    parameters = {
        name: tensor
        for name, tensor in unique_tensors(network).items()
        if isinstance(tensor, nn.Parameter) and name not in local
    }
    moved = None
    if correction is not None:
        known = {name: value for name, value in correction.items() if name in parameters}
        moved = {name: torch.from_numpy(value).to(parameters[name].device) for name, value in known.items()}
    terms = GradientTerms(parameters, proximal_mu, moved)
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.callback(optimizer.register_step_pre_hook(terms).remove)
        yield terms


class ControlVariate:
    """A site's c_i: read as the server knows it, changed in a round, kept for the next one.

    The server's sum has to be the sum of what the sites hold. A reply that was lost or set aside is not in it, so the site goes
    back to the c_i of the last round that the server counted.

    Args:
        states: the site's durable state.
        objective: with the server's c.
        network: holds the tensors that c is about.

    Raises:
        FederationError: c has a tensor that the network has not, or in another shape.
        CheckpointError: the c_i that the server counted is not here any more.
    """

    def __init__(self, states: RoundStates, objective: Objective, network: nn.Module) -> None:
        control = objective.control or {}
        like = unique_tensors(network)
        for name, value in control.items():
            if name not in like or tuple(like[name].shape) != value.shape:
                raise FederationError(
                    f"The control variate {name!r} {value.shape} belongs to no tensor of this network."
                )
        self.states = states
        self.counted = objective.counted
        self.names = sorted(control)
        held = states.exactly(CONTROL, objective.counted) if objective.counted is not None else {}
        self.own: Weights = {
            name: held[name].cpu().numpy() if name in held else np.zeros_like(control[name]) for name in self.names
        }
        self.correction: Weights = {name: control[name] - self.own[name] for name in self.names}

    def update(self, terms: GradientTerms, round_index: int) -> Weights:
        """Keep the new c_i and return its change, float32; zero for tensors without a gradient in this round."""
        change: Weights = {}
        for name in self.names:
            mean = terms.mean_gradient(name)
            change[name] = np.zeros_like(self.own[name]) if mean is None else mean.cpu().numpy() - self.own[name]
        state = {name: torch.from_numpy(self.own[name] + change[name]) for name in self.names}
        # Of the older ones only the counted one can be asked for again.
        self.states.keep(CONTROL, round_index, state, also={self.counted} if self.counted is not None else set())
        return change

"""Many networks of one kind at once: their parameters stacked, and one forward pass for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dynablocks.errors import InvalidArgument

if TYPE_CHECKING:
    from jaxtyping import Float


def stacked_parameters(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of equal networks by name, stacked along a new first dimension, as leaves that need gradients.

    Raises:
        InvalidArgument: no network, or networks of different parameters.

    Example:
        >>> stacked = stacked_parameters([nn.Linear(2, 3), nn.Linear(2, 3)])
        >>> stacked["weight"].shape
        torch.Size([2, 3, 2])
    """
    named = [dict(network.named_parameters()) for network in networks]
    shapes = [{name: parameter.shape for name, parameter in own.items()} for own in named]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise InvalidArgument(f"an ensemble needs networks of equal parameters; got {len(networks)} that differ.")
    # By name: networks that registered them in different orders have the same.
    return {name: torch.stack([own[name].detach() for own in named]).requires_grad_() for name in named[0]}


def ensemble_forward(
    template: nn.Module, parameters: Mapping[str, Tensor], x: Float[Tensor, "..."], *, shared: bool = True
) -> Float[Tensor, "runs batch ..."]:
    """The outputs of all runs, by ``torch.func`` over the template's own forward.

    Gradients reach the stacked parameters. Inside :func:`dynablocks.linear.frozen_weights` linear maps use the weights
    that the template holds, and not these.

    Args:
        template: a network of the ensemble. Its own parameters are not used; its buffers are, a fixed step among them,
            unless ``parameters`` has stacked ones under their names.
        parameters: stacked ones.
        x: one batch for all runs; without ``shared`` one for each, stacked along a new first dimension.
        shared: whether all runs take one batch.

    Raises:
        InvalidArgument: another number of batches than of runs, or a UnitDense or UnitConv in evaluation mode.

    Example:
        >>> networks = [nn.Linear(2, 3), nn.Linear(2, 3)]
        >>> stacked, x = stacked_parameters(networks), torch.randn(2, 5, 2)
        >>> outputs = ensemble_forward(networks[0], stacked, x[0])
        >>> bool(torch.allclose(outputs[1], networks[1](x[0]), atol=1e-6))
        True
        >>> outputs = ensemble_forward(networks[0], stacked, x, shared=False)
        >>> bool(torch.allclose(outputs[1], networks[1](x[1]), atol=1e-6))
        True
    """
    runs = len(next(iter(parameters.values()), x))
    if not shared and len(x) != runs:
        raise InvalidArgument(
            f"x holds {len(x)} batches for {runs} runs; without shared its first dimension counts the runs: give one "
            "batch for each, or shared=True for one batch of all."
        )

    def one(own: dict[str, Tensor], batch: Tensor) -> Tensor:
        return cast(Tensor, torch.func.functional_call(template, own, (batch,)))

    return torch.func.vmap(one, in_dims=(0, None if shared else 0))(dict(parameters), x)

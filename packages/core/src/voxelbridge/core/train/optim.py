"""Optimizers as settings, and the parameter groups they ask for."""

from typing import Annotated, Literal, assert_never

import torch
from pydantic import Field
from torch import nn

from voxelbridge.core.config import Config

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

# _NormBase is the common base of all batch and instance norms; torch has no public name for it.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class SGD(Config):
    """Stochastic gradient descent; the defaults are nnU-Net's and nnssl's."""

    name: Literal["sgd"] = "sgd"
    lr: Rate = 1e-2
    momentum: Fraction = 0.99
    nesterov: bool = True
    weight_decay: Decay = 3e-5
    decay_norm_layers: bool = True  # nnDetection: false


class AdamW(Config):
    """Adam with decoupled weight decay; `amsgrad` keeps the largest second moment."""

    name: Literal["adamw"] = "adamw"
    lr: Rate = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Rate = 1e-8  # nnDetection's DETR: 1e-4
    weight_decay: Decay = 1e-2
    decay_norm_layers: bool = True
    amsgrad: bool = False


Optim = Annotated[SGD | AdamW, Field(discriminator="name")]


def build_optimizer(config: SGD | AdamW, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the parameters of `module` that require gradients now."""
    groups = parameter_groups(
        module, weight_decay=config.weight_decay, decay_norm_layers=config.decay_norm_layers
    )
    match config:
        case SGD():
            return torch.optim.SGD(
                groups,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.nesterov and config.momentum > 0,
            )
        case AdamW():
            return torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, amsgrad=config.amsgrad
            )
        case _:
            assert_never(config)


def parameter_groups(
    module: nn.Module, *, weight_decay: float, decay_norm_layers: bool
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Parameter groups for an optimizer, norm layers without decay where asked.

    Every parameter that requires a gradient is in exactly one of them, the others in none.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    norms = [layer for layer in module.modules() if isinstance(layer, NORM_LAYERS)]
    undecayed = []
    if not decay_norm_layers:
        undecayed = [p for norm in norms for p in norm.parameters(False) if p.requires_grad]
    known = {id(parameter) for parameter in undecayed}
    decayed = [p for p in trainable if id(p) not in known]
    groups: list[dict[str, list[nn.Parameter] | float]] = [
        {"params": decayed, "weight_decay": weight_decay}
    ]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    return groups

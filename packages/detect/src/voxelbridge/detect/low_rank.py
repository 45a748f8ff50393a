"""Low-rank updates of convolutions (LoRA, arXiv 2106.09685): trained apart, one weight on export.

The weight (O, I, k, k, k) of a convolution stays as it is; what trains is `up` (O, R) and `down`
(R, I k^3), and the convolution computes with weight + alpha / rank * up @ down.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_WEIGHT = "weight"


class LowRankUpdate(nn.Module):
    """weight -> weight + alpha / rank * up @ down, exactly the weight at the start (`up` is 0).

    R is `rank`, or fewer where the weight has fewer rows or columns.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        kept = min(rank, outputs, inputs)
        self.scale = alpha / rank
        self.down = nn.Parameter(torch.empty(kept, inputs, device=weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, kept, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as LoRA's authors

    def forward(self, weight: Tensor) -> Tensor:
        # In float32 also under autocast: small updates would be lost in bf16's three digits.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down).view_as(weight)


def add_low_rank_updates(
    module: nn.Module, *, rank: int, alpha: float, trained: Collection[str] = ()
) -> None:
    """Freezes `module` and gives the weight of each of its 3D convolutions an update that trains.

    Parameters whose names are in `trained` stay as they are and train whole. Initial values come
    from torch's global stream.
    """
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Conv3d) and f"{name}.{_WEIGHT}" not in trained:
            update = LowRankUpdate(part.weight, rank=rank, alpha=alpha)
            # "unsafe" leaves out a trial run, which has no autocast to switch off on meta tensors.
            parametrize.register_parametrization(part, _WEIGHT, update, unsafe=True)


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of `module` with updates added to their weights, under the usual names."""
    state = dict(module.state_dict())
    for name, part in module.named_modules():
        if not parametrize.is_parametrized(part, _WEIGHT):
            continue
        prefix = f"{name}." if name else ""
        state = {k: v for k, v in state.items() if not k.startswith(f"{prefix}parametrizations.")}
        assert isinstance(part, nn.Conv3d)
        state[prefix + _WEIGHT] = part.weight.detach()
    return state

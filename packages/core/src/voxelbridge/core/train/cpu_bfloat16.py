"""Convolutions that torch gets wrong in bfloat16 on a CPU, in float32 there.

torch 2.13 (oneDNN, AVX512) returns uninitialised memory as the weight gradient of a padded 3D
convolution whose map is 2 deep or whose kernel is wider than 3, and may end the process; the loss
looks fine. Maps of at least 3 voxels per edge, kernels of 1, and transposed or unpadded
convolutions were right in thousands of random shapes.
"""

from typing import Any

import torch
from torch import Tensor, nn

_SAFE_EDGE = 3  # voxels of the input
_SAFE_KERNEL = 3


def run_fragile_convolutions_in_float32(module: nn.Module) -> None:
    """Makes the convolutions of `module` step out of autocast for such maps, which are small.

    Names of the state dict, weights and results in float32 stay as they are.
    """
    for part in module.modules():
        if not isinstance(part, nn.Conv3d) or isinstance(part.forward, _Careful):
            continue
        if part.padding not in ("valid", (0, 0, 0)):
            is_wide = any(edge > _SAFE_KERNEL for edge in part.weight.shape[2:])
            setattr(part, "forward", _Careful(part.forward, always=is_wide))  # noqa: B010 - torch's stubs name its argument


class _Careful:
    """Calls `forward`, a bound method so that copies fit too, in float32 where that is safer."""

    def __init__(self, forward: Any, *, always: bool) -> None:  # Any: a convolution's `forward`
        self.forward = forward
        self.always = always

    def __call__(self, x: Tensor) -> Tensor:
        if not self.always and min(x.shape[2:]) >= _SAFE_EDGE:
            return self.forward(x)
        with torch.autocast("cpu", enabled=False):
            return self.forward(x.float())

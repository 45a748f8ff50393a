"""What methods that hide blocks of a patch share: settings, check of the patch, views."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from voxelbridge.core.arch.config import Triple
from voxelbridge.pretrain_ssl.excluded_voxels import ExcludedVoxels
from voxelbridge.pretrain_ssl.masking import block_grid, hidden_count, random_block_mask


class BlockMasking(ExcludedVoxels):
    """Base of the configs of such methods."""

    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75  # of the blocks of a patch
    block_size: PositiveInt = 16  # edge of a mask block in voxels

    @property
    def reads_voxels(self) -> bool:
        """Whether `views` looks at the values of the patch, not at its shape alone."""
        return False

    def network_input(self, patch_size: Triple) -> Triple:
        """The size that the encoder sees."""
        return patch_size

    def check_patch(self, patch_size: Triple) -> None:
        """ValueError unless the blocks divide the patch, some are hidden and some are not."""
        grid = block_grid(patch_size, self.block_size)
        if hidden_count(grid, self.mask_ratio) == 0:
            raise ValueError(f"mask_ratio {self.mask_ratio} hides none of the {grid} blocks")

    def views(
        self,
        patch: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        masks: Mapping[str, NDArray[np.uint8]],
    ) -> dict[str, NDArray[Any]]:
        """`image` (C, D, H, W), `hidden` blocks (gz, gy, gx), and `excluded` where asked for."""
        grid = block_grid(patch.shape[1:], self.block_size)
        hidden = random_block_mask(rng, grid, ratio=self.mask_ratio)
        return {"image": patch, "hidden": hidden} | self.excluded(masks)

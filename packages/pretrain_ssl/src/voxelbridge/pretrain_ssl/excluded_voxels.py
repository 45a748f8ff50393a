"""Voxels that do not count in the loss: the setting that all reconstructing methods share."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from voxelbridge.core.config import Config


class ExcludedVoxels(Config):
    """Base of the configs of such methods."""

    exclude_mask: str | None = None  # stored mask whose voxels do not count, e.g. "anonymization"

    @property
    def used_masks(self) -> tuple[str, ...]:
        """Names of the stored masks that `views` takes."""
        return () if self.exclude_mask is None else (self.exclude_mask,)

    def excluded(
        self, masks: Mapping[str, NDArray[np.uint8]], *, flipped: tuple[int, ...] = ()
    ) -> dict[str, NDArray[np.bool_]]:
        """`excluded` (D, H, W), True = does not count, as a view; nothing where no mask is set.

        `flipped` are the axes, 0 = z, that the patch was flipped along.
        """
        if self.exclude_mask is None:
            return {}
        return {"excluded": np.flip(masks[self.exclude_mask], flipped) != 0}

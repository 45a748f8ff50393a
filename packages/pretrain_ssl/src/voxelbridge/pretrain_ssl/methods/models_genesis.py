"""Models Genesis: spoil a patch in four ways, restore it (arXiv 1908.06912).

Reproduced: local shuffling within 10,000 windows, intensities bent by a random Bezier curve,
in-painting and out-painting, in this order and with the original sizes and probabilities, flips
before them, and the mean squared error over all voxels against the clean patch.

Differs from the original: volumes are z-scored, so each patch's own range of intensities (0.5th to
99.5th percentile of each channel) stands for [0, 1] where the original has clipped HU, values
beyond it stay beyond it; the network is the U-Net of the other methods with a linear output, not a
V-Net with a sigmoid; flips are along the three spatial axes. `parity = "nnssl"` spoils z-scored
values as if they were in [0, 1], see docs/methods/models_genesis.md.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from voxelbridge.core.arch.config import DecoderConfig, Triple
from voxelbridge.core.arch.encoder import PlainEncoder, ResEncoder
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder, one_conv_per_level
from voxelbridge.pretrain_ssl.corruptions.bezier import bend, draw_control_points, draw_direction
from voxelbridge.pretrain_ssl.corruptions.intensity import (
    IntensityRange,
    patch_limits,
    unit_limits,
)
from voxelbridge.pretrain_ssl.corruptions.noise import draw_seed
from voxelbridge.pretrain_ssl.corruptions.painting import draw_cuboids, draw_paint, paint_noise
from voxelbridge.pretrain_ssl.corruptions.shuffling import draw_windows, no_windows, shuffle
from voxelbridge.pretrain_ssl.excluded_voxels import ExcludedVoxels
from voxelbridge.pretrain_ssl.panels import Picture, slice_panel

CITATIONS = (
    "Zhou et al., Models Genesis: Generic Autodidactic Models for 3D Medical Image Analysis, "
    "MICCAI 2019 (arXiv 1908.06912)",
    "Zhou et al., Models Genesis, Medical Image Analysis 67, 2021 (arXiv 2004.07882)",
)
MAX_FLIPS = 3
SPATIAL_AXES = (1, 2, 3)  # of a patch (C, D, H, W)
NNSSL_FLIP_AXES = (0, 1, 2)  # the channels for z, and never x

Parity = Literal["paper", "nnssl"]
Probability = Annotated[float, Field(ge=0, le=1)]


class ModelsGenesis(ExcludedVoxels):
    """Settings of the method, and how they become an objective and views of a patch."""

    name: Literal["models_genesis"] = "models_genesis"
    parity: Parity = "paper"
    flip_probability: Probability = 0.4  # of a flip, given the one before; at most three
    shuffle_probability: Probability = 0.5
    shuffle_windows: PositiveInt = 10_000
    nonlinear_probability: Probability = 0.9
    decreasing_share: Probability = 0.5  # of the curves
    paint_probability: Probability = 0.9
    outpaint_share: Probability = 0.8  # of the painted patches; the others are in-painted
    cuboid_probability: Probability = 0.95  # of a further cuboid, given the one before
    range_percentile: Annotated[float, Field(ge=0, lt=50)] = 0.5  # stands for 0; 0 = the minimum

    @property
    def citations(self) -> tuple[str, ...]:
        """Whom to cite."""
        return CITATIONS

    @property
    def reads_voxels(self) -> bool:
        """Whether `views` looks at the patch itself: flips it and takes its range."""
        return True

    def network_input(self, patch_size: Triple) -> Triple:
        """The size that the encoder sees."""
        return patch_size

    def check_patch(self, patch_size: Triple) -> None:
        """Every patch will do; along an edge below 20 voxels nothing is shuffled."""

    def build(self, encoder: ResEncoder | PlainEncoder) -> "ModelsGenesisObjective":
        """The U-Net around `encoder`, with one convolution per decoder level (nnU-Net ResEnc)."""
        shape = one_conv_per_level(encoder.config)
        decoder = build_decoder(shape, encoder.config)
        return ModelsGenesisObjective(encoder, decoder, decoder_config=shape, parity=self.parity)

    def views(
        self,
        patch: NDArray[np.float32],
        rng: np.random.Generator,
        *,
        masks: Mapping[str, NDArray[np.uint8]],
    ) -> dict[str, NDArray[Any]]:
        """The flipped patch (C, D, H, W) as `image`, `excluded`, and what `spoil` takes."""
        axes = self._flips(rng)
        image = np.ascontiguousarray(np.flip(patch, axes))
        flipped = tuple(axis - 1 for axis in axes if axis > 0)
        excluded = self.excluded(masks, flipped=flipped)
        return {"image": image} | self._corruption(image, rng) | excluded

    def _flips(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Axes of (C, D, H, W) to flip along: those drawn an odd number of times."""
        axes = NNSSL_FLIP_AXES if self.parity == "nnssl" else SPATIAL_AXES
        flipped: set[int] = set()
        for _ in range(MAX_FLIPS):
            if rng.random() >= self.flip_probability:
                break
            flipped ^= {axes[int(rng.integers(3))]}
        return tuple(sorted(flipped))

    def _corruption(
        self, image: NDArray[np.float32], rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        shape, count = image.shape[1:], self.shuffle_windows
        is_shuffled = rng.random() < self.shuffle_probability
        direction = draw_direction(
            rng, probability=self.nonlinear_probability, decreasing_share=self.decreasing_share
        )
        paint = draw_paint(
            rng, probability=self.paint_probability, outpaint_share=self.outpaint_share
        )
        nnssl = self.parity == "nnssl"
        return {
            "limits": unit_limits(len(image))
            if nnssl
            else patch_limits(image, self.range_percentile),
            "windows": draw_windows(rng, shape, count=count) if is_shuffled else no_windows(count),
            "shuffle_seed": draw_seed(rng),
            "direction": np.array(direction, dtype=np.int8),
            "control_points": draw_control_points(rng),
            "paint": np.array(paint, dtype=np.int8),
            "cuboids": draw_cuboids(rng, shape, paint, probability=self.cuboid_probability),
            "noise_seed": draw_seed(rng),
        }


class ModelsGenesisObjective(nn.Module):
    """Encoder, decoder and a 1x1x1 output layer; `forward` gives the restoration loss."""

    def __init__(
        self,
        encoder: ResEncoder | PlainEncoder,
        decoder: UNetDecoder,
        *,
        decoder_config: DecoderConfig,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.output = nn.Conv3d(decoder.channels[0], encoder.in_channels, 1)
        self.decoder_config = decoder_config
        self.parity: Parity = parity

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """`image` (B, C, D, H, W) with all that `ModelsGenesis.views` adds to it.

        With `excluded` (B, D, H, W) bool, these voxels do not count.
        """
        # what `spoil` does depends on the draw: compiled, it would be compiled anew every step
        compiling = torch.compiler.is_compiling()
        spoiling: Any = torch.compiler.disable(spoil) if compiling else spoil  # Any: loosely typed
        restored = self.restore(spoiling(batch, self.parity))
        return {"total": counted_mse(restored, batch["image"], batch.get("excluded"))}

    def trivial(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of predicting 0, the volume's mean after z-score.

        A patch's own mean is no fair bar: the network sees the spoiled patch alone.
        """
        image = batch["image"]
        return counted_mse(torch.zeros_like(image), image, batch.get("excluded"))

    def pictures(self, batch: dict[str, Tensor]) -> Picture:
        """Middle slices of the first patch: clean, as the network sees it, restored."""
        first = {name: value[:1] for name, value in batch.items() if isinstance(value, Tensor)}
        with torch.no_grad():
            spoiled = spoil(first, self.parity)
            restored = self.restore(spoiled)
        volumes = {"image": first["image"], "corrupted": spoiled, "reconstruction": restored}
        panels = tuple(slice_panel(name, volume[0]) for name, volume in volumes.items())
        return Picture("slices", panels)

    def restore(self, image: Tensor) -> Tensor:
        """(B, C, D, H, W) -> reconstruction of the same shape."""
        return self.output(self.decoder(self.encoder(image))[0])


@torch.no_grad()
def spoil(batch: Mapping[str, Tensor], parity: Parity) -> Tensor:
    """The patches as the network sees them: `image` shuffled, bent, then painted.

    Everything random is in the batch, see `ModelsGenesis.views`; the result is the same on every
    device but for rounding. Reads a few numbers per sample from the device, twice. With "nnssl"
    only the first channel is shuffled, and values beyond the curve count as its ends.
    """
    nnssl = parity == "nnssl"
    image = batch["image"]
    spoiled = shuffle(image[:, :1] if nnssl else image, batch["windows"], batch["shuffle_seed"])
    if nnssl:
        spoiled = torch.cat([spoiled, image[:, 1:]], dim=1)
    flags = torch.stack([batch["direction"], batch["paint"]], dim=1).tolist()
    for sample, (direction, paint) in enumerate(flags):  # one by one: what is not drawn is free
        one = slice(sample, sample + 1)
        within = IntensityRange.from_limits(batch["limits"][one])
        if direction:
            points = batch["control_points"][one]
            spoiled[one] = bend(
                spoiled[one], points, batch["direction"][one], within=within, keep_tails=not nnssl
            )
        if paint:
            cuboids, seed = batch["cuboids"][one], batch["noise_seed"][one]
            spoiled[one] = paint_noise(
                spoiled[one], batch["paint"][one], cuboids, seed, within=within
            )
    return spoiled


def counted_mse(prediction: Tensor, image: Tensor, excluded: Tensor | None) -> Tensor:
    """Mean of (prediction - image)^2 over all voxels that are not `excluded`, in float32.

    (B, C, D, H, W), both; (B, D, H, W) bool. What is excluded need not be finite; 0 where all is.
    """
    prediction = prediction.float()
    if excluded is None:
        return (prediction - image).square().mean()
    left_out = excluded[:, None]
    squares = (torch.where(left_out, image, prediction) - image).square()
    count = (~excluded).sum().clamp(min=1) * image.shape[1]
    return torch.where(left_out, 0.0, squares).sum() / count

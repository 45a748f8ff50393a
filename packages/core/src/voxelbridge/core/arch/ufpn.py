"""U-FPN: the feature pyramid of nnDetection's Retina U-Net, up to full resolution."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from voxelbridge.core.arch.config import EncoderConfig, Triple, UFPNConfig, cumulative_strides


class UFPN(nn.Module):
    """List of encoder maps, finest first -> list of pyramid maps of the levels asked for.

    Per level a 1x1x1 lateral convolution; from coarse to fine a transposed convolution (kernel =
    stride; nnDetection v0.1 gives it a bias) is added; a 3x3x3 convolution per level gives the
    output. No norm and no activation anywhere. `strides` are input voxels per cell
    (`encoder.strides`). Levels from `first_level` on have `out_channels`; each finer level has half
    of them, at least `min_channels`. With six levels of the paper's encoders: 32, 64, 128, 128,
    128, 128.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[Triple],
        *,
        out_channels: int = 128,
        first_level: int = 2,
        min_channels: int = 8,
        kernel: Triple = (3, 3, 3),
        upsample_bias: bool = False,
    ) -> None:
        super().__init__()
        if len(in_channels) != len(strides):
            raise ValueError(f"{len(in_channels)} channels for {len(strides)} strides")
        if not 0 <= first_level < len(strides):
            raise ValueError(f"first_level must be below {len(strides)}, got {first_level}")
        self._strides = tuple(strides)
        self._channels = tuple(
            max(min_channels, out_channels >> max(0, first_level - level))
            for level in range(len(strides))
        )
        self.lateral = nn.ModuleList(
            nn.Conv3d(before, after, 1)
            for before, after in zip(in_channels, self._channels, strict=True)
        )
        self.upsample = nn.ModuleList(
            nn.ConvTranspose3d(below, here, factor, factor, bias=upsample_bias)
            for here, below, factor in zip(
                self._channels[:-1], self._channels[1:], _factors(strides), strict=True
            )
        )
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.out = nn.ModuleList(
            nn.Conv3d(here, here, kernel, padding=padding) for here in self._channels
        )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of every level, finest first."""
        return self._channels

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Input voxels per cell (z, y, x) of every level, finest first."""
        return self._strides

    def forward(
        self, features: Sequence[Tensor], *, levels: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Maps of `levels` in the order given (None: all, finest first).

        Nothing is computed for levels finer than the finest one asked for.
        """
        count = len(self._channels)
        if len(features) != count:
            raise ValueError(f"expected {count} encoder maps, got {len(features)}")
        wanted = range(count) if levels is None else levels
        if any(not 0 <= level < count for level in wanted):
            raise ValueError(f"levels {list(wanted)} are not all within 0..{count - 1}")
        if not wanted:
            return []
        x = self.lateral[-1](features[-1])
        fused = {count - 1: x}
        for level in reversed(range(min(wanted), count - 1)):
            x = self.lateral[level](features[level]) + self.upsample[level](x)
            fused[level] = x
        return [self.out[level](fused[level]) for level in wanted]


def build_ufpn(config: UFPNConfig, encoder: EncoderConfig) -> UFPN:
    """The pyramid that `config` describes, over an encoder described by `encoder`."""
    return UFPN(
        encoder.features,
        cumulative_strides(encoder.strides),
        out_channels=config.out_channels,
        first_level=config.first_level,
        min_channels=config.min_channels,
        kernel=config.kernel,
        upsample_bias=config.upsample_bias,
    )


def _factors(strides: Sequence[Triple]) -> list[Triple]:
    """Upsampling factor from each level's next coarser one to it."""
    factors: list[Triple] = []
    for fine, coarse in pairwise(strides):
        if any(c % f for f, c in zip(fine, coarse, strict=True)):
            raise ValueError(f"stride {coarse} is no multiple of the finer level's {fine}")
        factors.append((coarse[0] // fine[0], coarse[1] // fine[1], coarse[2] // fine[2]))
    return factors

"""The encoders that the presets name: two of the paper, two small ones for a CPU."""

from collections.abc import Mapping
from types import MappingProxyType

from voxelbridge.core.arch.config import EncoderConfig

# ResEnc-L of nnU-Net's residual encoder presets (arXiv 2404.09556): 90,296,576 parameters.
RESENC_L = EncoderConfig(
    kind="residual",
    features=(32, 64, 128, 256, 320, 320),
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
    kernels=((3, 3, 3),) * 6,
    blocks=(1, 3, 4, 6, 6, 6),
    conv_bias=True,
)

# The plain encoder of nnDetection's Retina U-Net (arXiv 2106.00817): 14,022,880 parameters.
PLAIN = EncoderConfig(
    kind="plain",
    features=(32, 64, 128, 256, 320, 320),
    strides=((1, 1, 1), *((2, 2, 2),) * 5),
    kernels=((3, 3, 3),) * 6,
    blocks=(2,) * 6,
    conv_bias=False,
)

RESENC_SMALL = EncoderConfig(
    kind="residual",
    features=(8, 16, 32, 64),
    strides=((1, 1, 1), *((2, 2, 2),) * 3),
    kernels=((3, 3, 3),) * 4,
    blocks=(1,) * 4,
    conv_bias=True,
)

PLAIN_SMALL = EncoderConfig(
    kind="plain",
    features=(8, 16, 32, 64),
    strides=((1, 1, 1), *((2, 2, 2),) * 3),
    kernels=((3, 3, 3),) * 4,
    blocks=(2,) * 4,
    conv_bias=False,
)

ENCODER_PRESETS: Mapping[str, EncoderConfig] = MappingProxyType(
    {
        "resenc_l": RESENC_L,
        "plain": PLAIN,
        "resenc_small": RESENC_SMALL,
        "plain_small": PLAIN_SMALL,
    }
)

"""Either kind of decoder that a checkpoint can hold beside an encoder."""

from typing import assert_never

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    DecoderConfig,
    EncoderConfig,
    UFPNConfig,
)
from voxelbridge.core.arch.ufpn import UFPN, build_ufpn
from voxelbridge.core.arch.unet import UNetDecoder, build_decoder

Decoder = UNetDecoder | UFPN


def build_any_decoder(config: AnyDecoderConfig, encoder: EncoderConfig) -> Decoder:
    """The U-Net decoder or U-FPN that `config` describes, over an encoder described by `encoder`.

    ValueError where the two do not go together.
    """
    match config:
        case DecoderConfig():
            return build_decoder(config, encoder)
        case UFPNConfig():
            return build_ufpn(config, encoder)
        case _:
            assert_never(config)


def decoder_kind(decoder: Decoder) -> str:
    """The `kind` in the config of a decoder like this one."""
    return "ufpn" if isinstance(decoder, UFPN) else "unet"

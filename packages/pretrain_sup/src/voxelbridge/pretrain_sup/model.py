"""Segmentation networks with one stem and one head per data set around a shared trunk.

After MultiTalent as the paper pre-trains with it (arXiv 2509.15947, section 2.2): every data set
has a first convolution of its own for its channels and output layers of its own for its labels;
stages and decoder are shared. Two networks: the residual U-Net, and the Retina U-Net without its
detection heads (plain encoder and U-FPN). Both have output layers on all levels of the decoder.

A stem and a head that no sample of a batch uses are not run at all: their gradient stays None, so
that neither weight decay nor momentum moves them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from voxelbridge.core.arch.config import (
    AnyDecoderConfig,
    EncoderConfig,
    Triple,
    cumulative_strides,
)
from voxelbridge.core.arch.decoder import Decoder, build_any_decoder
from voxelbridge.core.arch.encoder import build_encoder, build_stem, check_input_shape
from voxelbridge.core.arch.init import InitMethod, initialize
from voxelbridge.core.arch.ufpn import UFPN
from voxelbridge.core.checkpoint import RESERVED_STEM_NAMES, is_stem_name
from voxelbridge.core.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def key_of(name: str) -> str:
    """What stands for `name` in the names of tensors."""
    return name.replace(".", "/")


class Named(nn.Module, Generic[M]):
    """Modules under names that `nn.ModuleDict` refuses, such as `type` or `organs.0`.

    In the names of their tensors a dot becomes `/`, so that no name is the beginning of another.
    """

    def __init__(self, modules: Mapping[str, M]) -> None:
        super().__init__()
        keys = {name: key_of(name) for name in modules}
        if "" in keys or len(set(keys.values())) < len(keys):
            raise ValueError(f"names must be distinct and not empty, got {list(modules)}")
        self._keys = keys
        # Past add_module, which takes no name that a method of modules has.
        self._modules.update({keys[name]: module for name, module in modules.items()})

    def train(self, mode: bool = True) -> "Named[M]":
        object.__setattr__(self, "training", mode)  # even where a module has that name
        for module in self.children():
            module.train(mode)
        return self

    def __getitem__(self, name: str) -> M:
        return cast(M, self._modules[self._keys[name]])

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class MultiStemEncoder(nn.Module):
    """A core encoder with several stems: groups of images -> list of maps, finest first.

    Its tensors have the names of a checkpoint with several stems: `stems.<name>.*`, `stages.*`.
    """

    def __init__(self, config: EncoderConfig, stems: Mapping[str, int]) -> None:
        """`stems`: input channels of every stem."""
        super().__init__()
        if not stems:
            raise ValueError("an encoder needs at least one stem")
        unfit = [name for name in stems if not is_stem_name(name)]
        if unfit:  # told before the training, not when its checkpoint is written
            raise ConfigError(
                f"stem {unfit[0]!r}: a checkpoint takes 1 to 64 letters, digits, - and _, except "
                f"{', '.join(sorted(RESERVED_STEM_NAMES))}; name the data set so"
            )
        self._config = config
        self._stem_channels = dict(stems)
        self._strides = cumulative_strides(config.strides)
        self.stems = Named(
            {name: build_stem(config, in_channels=channels) for name, channels in stems.items()}
        )
        self.stages = build_encoder(config, in_channels=1).stages

    @property
    def config(self) -> EncoderConfig:
        return self._config

    @property
    def stem_channels(self) -> dict[str, int]:
        """Input channels of every stem."""
        return dict(self._stem_channels)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each stage output, finest first."""
        return self._config.features

    @property
    def strides(self) -> tuple[Triple, ...]:
        """Input voxels per cell of each stage output (z, y, x), finest first."""
        return self._strides

    def forward(self, groups: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
        """Groups (stem, (B, C, D, H, W)) -> maps of all their samples in the order given."""
        stemmed: list[Tensor] = []
        for name, images in groups:
            check_input_shape(images.shape, self._channels_of(name), self._strides[-1])
            stemmed.append(self.stems[name](images))
        x = stemmed[0] if len(stemmed) == 1 else torch.cat(stemmed)
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def _channels_of(self, stem: str) -> int:
        if stem not in self._stem_channels:
            raise ValueError(f"no stem {stem!r}; stems are {', '.join(self._stem_channels)}")
        return self._stem_channels[stem]


class Head(nn.Module):
    """One 1x1x1 convolution per decoder level: maps, finest first -> logits, finest first."""

    def __init__(self, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv3d(width, outputs, 1) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(map_) for level, map_ in zip(self.levels, maps, strict=True)]


class SegmentationNetwork(nn.Module):
    """Stems, trunk and heads: images of different data sets in one batch -> logits per level."""

    def __init__(
        self, encoder: MultiStemEncoder, decoder: Decoder, heads: Mapping[str, int]
    ) -> None:
        """`heads`: output channels of every head."""
        super().__init__()
        if not heads:
            raise ValueError("a network needs at least one head")
        self.encoder = encoder
        self.decoder = decoder
        self.heads = Named({name: Head(decoder.channels, count) for name, count in heads.items()})
        self._outputs = dict(heads)

    @property
    def head_outputs(self) -> dict[str, int]:
        """Output channels of every head."""
        return dict(self._outputs)

    @property
    def level_strides(self) -> tuple[Triple, ...]:
        """Input voxels per voxel of the logits (z, y, x), per level, finest first."""
        return self.encoder.strides[: len(self.decoder.channels)]

    def forward(
        self, images: Sequence[Tensor], stem_names: Sequence[str], head_names: Sequence[str]
    ) -> list[list[Tensor]]:
        """Samples (C_d, D, H, W) with their stems and heads -> per sample logits of every level.

        Logits are (K, d, h, w), finest level first, in the order of the samples. D, H and W are
        equal for all samples. A stem runs once per call, the trunk once on all samples, a head
        once per stem that it occurs with.
        """
        self._check(images, stem_names, head_names)
        # Samples of equal stem and head lie side by side, so that all groups are views. What norm
        # a sample has depends on no other sample, so that the order does not matter.
        uses = list(zip(stem_names, head_names, strict=True))
        first_use = {use: index for index, use in reversed(list(enumerate(uses)))}
        first_stem = {stem: index for index, stem in reversed(list(enumerate(stem_names)))}
        order = sorted(range(len(uses)), key=lambda i: (first_stem[uses[i][0]], first_use[uses[i]]))
        groups = [
            (stem, torch.stack([images[index] for index in members]))
            for stem, members in groupby(order, key=lambda index: stem_names[index])
        ]
        maps = self.decoder(self.encoder(groups))
        logits = self._run_heads(maps, [head_names[index] for index in order])
        by_sample = dict(zip(order, logits, strict=True))
        return [by_sample[index] for index in range(len(order))]

    def predict(self, images: Tensor, *, stem: str, heads: Sequence[str]) -> dict[str, Tensor]:
        """(B, C, D, H, W) of one stem -> logits (B, K, D, H, W) at full resolution, per head."""
        self._check_names([stem], heads)
        encoded = self.encoder([(stem, images)])
        match self.decoder:
            case UFPN() as pyramid:
                finest = pyramid(encoded, levels=(0,))[0]
            case decoder:
                finest = decoder(encoded)[0]
        return {name: self.heads[name].levels[0](finest) for name in heads}

    def _run_heads(self, maps: Sequence[Tensor], head_names: Sequence[str]) -> list[list[Tensor]]:
        runs = [(name, len(list(members))) for name, members in groupby(head_names)]
        # Split once: slices one by one would each fill a gradient of the whole map.
        parts = [map_.split([count for _, count in runs]) for map_ in maps]
        logits: list[list[Tensor]] = []
        for (name, _), own_maps in zip(runs, zip(*parts, strict=True), strict=True):
            per_level = [level.unbind() for level in self.heads[name](own_maps)]
            logits += [list(levels) for levels in zip(*per_level, strict=True)]
        return logits

    def _check(
        self, images: Sequence[Tensor], stem_names: Sequence[str], head_names: Sequence[str]
    ) -> None:
        if not 0 < len(images) == len(stem_names) == len(head_names):
            raise ValueError(
                "expected a stem and a head for every image, got "
                f"{len(images)} images, {len(stem_names)} stems, {len(head_names)} heads"
            )
        self._check_names(stem_names, head_names)
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise ValueError(f"images of one batch must have one size (z, y, x), got {sizes}")
        for image, stem in zip(images, stem_names, strict=True):
            channels = self.encoder.stem_channels[stem]
            if image.ndim != 4 or len(image) != channels:
                raise ValueError(
                    f"stem {stem} takes an image ({channels}, D, H, W), got {tuple(image.shape)}"
                )

    def _check_names(self, stem_names: Sequence[str], head_names: Sequence[str]) -> None:
        for kind, names, known in (
            ("stem", stem_names, self.encoder.stems),
            ("head", head_names, self.heads),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(f"no {kind} {unknown[0]!r}; {kind}s are {', '.join(known)}")


def build_network(
    encoder: EncoderConfig,
    decoder: AnyDecoderConfig,
    *,
    stems: Mapping[str, int],
    heads: Mapping[str, int],
    init: InitMethod,
) -> SegmentationNetwork:
    """The network for `stems` (name -> channels) and `heads` (name -> outputs), initialised.

    The numbers come from torch's generator, the trunk's first: further stems and heads leave it as
    it would be without them.
    """
    with torch.random.fork_rng(devices=()):  # what the constructors draw counts for nothing
        network = SegmentationNetwork(
            MultiStemEncoder(encoder, stems), build_any_decoder(decoder, encoder), heads
        )
    initialize(network.encoder.stages, init)
    # nnDetection counts the outputs of its pyramid's convolutions.
    fan = "fan_out" if isinstance(network.decoder, UFPN) else "fan_in"
    initialize(network.decoder, init, fan=fan)
    initialize(network.encoder.stems, init)
    initialize(network.heads, init)
    return network

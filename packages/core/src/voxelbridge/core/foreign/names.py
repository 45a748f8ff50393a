"""Names of foreign networks -> names of the canonical checkpoint, always on whole dotted parts.

Known are the networks of dynamic-network-architectures (nnU-Net v2, nnssl, MultiTalent), those of
nnDetection v1 and v2, our own names, and either encoder alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from voxelbridge.core.checkpoint import is_stem_name
from voxelbridge.core.foreign.safe_torch import ForeignFile
from voxelbridge.core.safetensors_header import quoted, refusal

SINGLE = ""  # key of the only stem, where it has no name

_LEAF = r"(?P<leaf>(?:conv|norm)\.(?:weight|bias))"
_ENCODER = re.compile(
    r"(?:model\.)?(?:(?:backbone|encoder)\.){0,2}(?:resenc\.)?(?P<rest>(?:stem|stems|stages)\..+)"
)
_DECODER = re.compile(r"(?:model\.)?(?:decoder|neck)\.(?P<rest>.+)")
_STEM = re.compile(rf"stem\.(?:convs\.)?(?:0\.)?{_LEAF}")
_NAMED_STEM = re.compile(rf"stems?\.(?P<id>[^.]+)\.(?:convs\.)?(?:0\.)?{_LEAF}")
_BLOCK = re.compile(
    rf"stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\.(?P<conv>conv1|conv2)\.{_LEAF}"
)
_SKIP = re.compile(rf"stages\.(?P<stage>\d+)\.blocks\.0\.skip\.(?:[01]\.)?{_LEAF}")
_PLAIN = re.compile(
    rf"stages\.(?P<stage>\d+)\.(?P<form>0\.convs|convs\.0|convs)\.(?P<conv>\d+)\.{_LEAF}"
)
_UNET_STAGE = re.compile(rf"stages\.(?P<level>\d+)\.convs\.(?P<conv>\d+)\.{_LEAF}")
_UNET_UP = re.compile(r"transpconvs\.(?P<level>\d+)\.(?P<leaf>weight|bias)")
_OWN_UP = re.compile(r"upsample\.(?P<level>\d+)\.(?P<leaf>weight|bias)")
_PYRAMID = re.compile(
    r"(?P<kind>lateral|out|up)\.P(?P<level>\d+)\.(?:0\.)?(?:conv\.)?(?P<leaf>weight|bias)"
)
_OWN_PYRAMID = re.compile(r"(?P<kind>lateral|out)\.(?P<level>\d+)\.(?P<leaf>weight|bias)")
_OUTPUTS = re.compile(r"(?:model\.)?decoder\.seg_layers\..+")


@dataclass(eq=False)
class NamedWeights:
    """Weights by part, under canonical names within it.

    `stems`: name of the stem (`SINGLE` for an unnamed one) -> leaf -> tensor. `others`: names in
    the file that belong to neither part, such as heads; `outputs`: a decoder's output layers.
    """

    encoder: dict[str, Tensor] = field(default_factory=dict)
    decoder: dict[str, Tensor] = field(default_factory=dict)
    stems: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # inside the encoder or decoder


def sort_names(file: ForeignFile, weights: Mapping[str, Tensor]) -> NamedWeights:
    """`weights` by part; nothing is left out, see `NamedWeights`."""
    found = NamedWeights()
    plain: dict[str, Tensor] = {}
    levels = _num_levels(weights)
    for name, tensor in weights.items():
        if _OUTPUTS.fullmatch(name):
            found.outputs.append(name)
        elif match := _DECODER.fullmatch(name):
            _put(file, found, found.decoder, _decoder_name(match["rest"], levels), name, tensor)
        elif not (match := _ENCODER.fullmatch(name)):
            found.others.append(name)
        elif match["rest"].startswith("stem"):
            stem, leaf = _stem_name(file, match["rest"])
            table = {} if leaf is None else found.stems.setdefault(stem, {})
            _put(file, found, table, leaf, name, tensor)
        else:
            key = _stage_name(match["rest"])
            table = plain if key is not None and ".convs." in key else found.encoder
            _put(file, found, table, key, name, tensor)
    _place_plain(found, plain)
    return found


def _put(
    file: ForeignFile,
    found: NamedWeights,
    table: dict[str, Tensor],
    key: str | None,
    name: str,
    tensor: Tensor,
) -> None:
    if key is None:
        found.unknown.append(name)
    elif key in table:
        raise refusal(file.path, f"{quoted(name)} and another tensor are one weight, {key}")
    else:
        table[key] = tensor


def _stem_name(file: ForeignFile, rest: str) -> tuple[str, str | None]:
    if match := _STEM.fullmatch(rest):
        return SINGLE, match["leaf"]
    match = _NAMED_STEM.fullmatch(rest)
    if match is None:
        return SINGLE, None
    if not is_stem_name(match["id"]):
        shown = quoted(match["id"])
        raise refusal(file.path, f"a stem is called {shown}, which no checkpoint can hold")
    return match["id"], match["leaf"]


def _stage_name(rest: str) -> str | None:
    if match := _BLOCK.fullmatch(rest):
        block = f"stages.{int(match['stage'])}.blocks.{int(match['block'])}"
        return f"{block}.{match['conv']}.{match['leaf']}"
    if match := _SKIP.fullmatch(rest):
        return f"stages.{int(match['stage'])}.blocks.0.skip.{match['leaf']}"
    if match := _PLAIN.fullmatch(rest):
        return f"stages.{int(match['stage'])}.convs.{int(match['conv'])}.{match['leaf']}"
    return None


def _place_plain(found: NamedWeights, plain: Mapping[str, Tensor]) -> None:
    """The very first convolution of a plain encoder is the stem, unless there is one already."""
    has_stem = bool(found.stems)
    for name, tensor in plain.items():
        _, stage, _, conv, leaf = name.split(".", maxsplit=4)
        if stage != "0" or has_stem:
            found.encoder[name] = tensor
        elif conv == "0":
            found.stems.setdefault(SINGLE, {})[leaf] = tensor
        else:
            found.encoder[f"stages.0.convs.{int(conv) - 1}.{leaf}"] = tensor


def _decoder_name(rest: str, levels: int) -> str | None:
    """Foreign U-Nets count their levels from the coarsest, pyramids and we from the finest."""
    if match := _OWN_UP.fullmatch(rest):
        return f"upsample.{int(match['level'])}.{match['leaf']}"
    if match := _UNET_UP.fullmatch(rest):
        return f"upsample.{levels - 1 - int(match['level'])}.{match['leaf']}"
    if match := _UNET_STAGE.fullmatch(rest):
        level = int(match["level"])
        level = levels - 1 - level if levels else level  # no foreign upsampling: our own names
        return f"stages.{level}.convs.{int(match['conv'])}.{match['leaf']}"
    if match := _OWN_PYRAMID.fullmatch(rest) or _PYRAMID.fullmatch(rest):
        level = int(match["level"])
        if match["kind"] == "up":  # nnDetection names it after the level it starts from
            return f"upsample.{level - 1}.{match['leaf']}" if level else None
        return f"{match['kind']}.{level}.{match['leaf']}"
    return None


def _num_levels(weights: Mapping[str, Tensor]) -> int:
    """Levels of a decoder that is named from the coarsest; 0 where there is none."""
    found = (re.fullmatch(r"(?:model\.)?decoder\.transpconvs\.(\d+)\.weight", n) for n in weights)
    return max((int(match[1]) + 1 for match in found if match), default=0)

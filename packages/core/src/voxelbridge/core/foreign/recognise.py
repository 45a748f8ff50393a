"""Which program a file comes from, told by what it holds and never by its name."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from voxelbridge.core.foreign.adaptation_plan import NNSSL_KEY, is_nnssl_plan, is_nnunet_plan
from voxelbridge.core.foreign.safe_torch import ForeignFile
from voxelbridge.core.safetensors_header import quoted, refusal

Origin = Literal["nnunet", "nnssl", "multitalent", "nndetection", "plain"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)

_SEVERAL_STEMS = re.compile(
    r"(?:model\.)?(?:(?:backbone|encoder)\.){1,2}(?:resenc\.)?stem\.(?!convs\.)[^.]+"
    r"\.(?:(?:convs\.)?0\.)?(?:conv|norm)\.\w+"
)
_HEADS_PER_DATASET = re.compile(r"decoder\.seg_layers\.[^.]+\.\d+\..+")
_NNDETECTION = re.compile(
    r"model\.(?:encoder|backbone|decoder|head|segmenter|neck)\..+|(?:encoder\.)?stages\.\d+\.convs\.0\.\d+\..+"
)
_NETWORK = re.compile(r"(?:encoder\.)?(?:stem|stems|stages)\..+")


def recognise(file: ForeignFile, names: Iterable[str], plan: Mapping[Any, Any] | None) -> Origin:
    """The origin of `file` with tensors called `names`; `plan` is one given beside it.

    CheckpointError, which lists what was seen, where nothing fits.
    """
    names = list(names)
    arguments = file.tree.get("init_args")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    _refuse_known_strangers(file, names)
    if any(_SEVERAL_STEMS.fullmatch(name) for name in names):
        return "multitalent"
    if any(_HEADS_PER_DATASET.fullmatch(name) for name in names):
        return "multitalent"
    if (
        any(key in file.tree for key in (NNSSL_KEY, "spark_weights"))
        or "pretrain_json" in arguments
    ):
        return "nnssl"
    if isinstance(arguments.get("plans"), Mapping):
        return "nnunet"
    if any(_NNDETECTION.fullmatch(name) for name in names):
        return "nndetection"
    if plan is not None and is_nnssl_plan(plan):
        return "nnssl"
    if plan is not None and is_nnunet_plan(plan):
        return "nnunet"
    known = any(_NETWORK.fullmatch(name) for name in names)
    if known and "network_weights" in file.tree:
        return "nnssl" if "citations" in file.tree else "nnunet"
    if known:
        return "plain"
    entries = ", ".join(quoted(str(key)) for key in list(file.tree)[:6])
    tensors = ", ".join(quoted(name) for name in names[:3])
    raise refusal(
        file.path,
        f"not recognised as a file of {', '.join(ORIGINS)}; it holds {entries}; tensors such as "
        f"{tensors}",
    )


def _refuse_known_strangers(file: ForeignFile, names: list[str]) -> None:
    if any(name.startswith("conv_blocks_context.") for name in names):
        raise refusal(file.path, "a network of nnU-Net v1, which cannot be converted; train in v2")
    if any(name.startswith(("eva.", "encoder.eva.", "vit.")) for name in names):
        raise refusal(
            file.path,
            "a vision transformer (such as Primus); only residual and plain convolutional encoders "
            "can be imported",
        )

"""Further data sets for a trained network: new stems and heads, everything else as it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from voxelbridge.core.errors import CheckpointError
from voxelbridge.pretrain_sup.model import SegmentationNetwork, key_of

_SHOWN = 4  # differences spelled out in an error


@dataclass(frozen=True)
class Growth:
    """What a network has beyond the state that it took over."""

    stems: tuple[str, ...]
    heads: tuple[str, ...]
    widened: tuple[str, ...]  # heads with more outputs than before


def grow(
    network: SegmentationNetwork,
    state: Mapping[str, Tensor],
    *,
    outputs: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> Growth:
    """Copies the whole `state` of a smaller network into `network`; what is new stays at init.

    New may be stems and heads that `state` has nothing of. `outputs` names the heads that got
    more outputs (the joint layout has one for all data sets): `outputs[head][i]` is where the old
    output i now stands. Every other difference in names or shapes is a CheckpointError, and then
    nothing has been copied.
    """
    targets = network.state_dict()
    stems = {f"encoder.stems.{key_of(name)}.": name for name in network.encoder.stems}
    heads = {f"heads.{key_of(name)}.": name for name in network.heads}
    rows = {f"heads.{key_of(name)}.": _rows(network, name, at) for name, at in outputs.items()}
    new = [
        prefix for prefix in [*stems, *heads] if not any(name.startswith(prefix) for name in state)
    ]
    problems = [f"{name} of the state is not in the network" for name in state.keys() - targets]
    problems += [
        f"{name} is not in the state"
        for name in targets.keys() - state.keys()
        if not name.startswith(tuple(new))
    ]
    places: dict[str, Tensor] = {}  # which outputs of a widened head a tensor fills
    for name in state.keys() & targets.keys():
        own = next((at for prefix, at in rows.items() if name.startswith(prefix)), None)
        shape = tuple(targets[name].shape)
        if own is not None:
            places[name] = own
            shape = (len(own), *shape[1:])
        if tuple(state[name].shape) != shape:
            problems.append(f"{name}: state {tuple(state[name].shape)}, expected {shape}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the state does not grow into the network in {len(problems)} places, add data sets "
            f"and change nothing else: {'; '.join(sorted(problems)[:_SHOWN])}{more}"
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name in places:
                targets[name][places[name]] = tensor.to(targets[name])
            else:
                targets[name].copy_(tensor)
    return Growth(
        stems=tuple(stems[prefix] for prefix in new if prefix in stems),
        heads=tuple(heads[prefix] for prefix in new if prefix in heads),
        widened=tuple(outputs),
    )


def _rows(network: SegmentationNetwork, head: str, places: Sequence[int]) -> Tensor:
    count = network.head_outputs.get(head)
    if count is None:
        raise ValueError(f"no head {head!r}; heads are {', '.join(network.heads)}")
    if len(set(places)) < len(places) or not all(0 <= place < count for place in places):
        raise ValueError(f"outputs of head {head} must be distinct and below {count}: {places}")
    return torch.tensor(list(places), dtype=torch.int64)

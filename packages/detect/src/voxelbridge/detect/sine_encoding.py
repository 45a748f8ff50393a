"""Sine encodings of positions and of boxes in three dimensions (arXiv 1706.03762, section 3.5).

A width that three axes do not share evenly is split into equal even parts for z, y and x; what is
left over is zero. (Peers cut features off some axes, in ways that differ between their versions.)
The rule's name is stored with every detector that uses it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

POSITION_RULE = "even_split_then_zeros"
TEMPERATURE = 10_000.0
FULL_TURN = 2 * math.pi  # normalised coordinates become angles


def sine_features(positions: Tensor, num_features: int) -> Tensor:
    """Sines and cosines, interleaved, of coordinates in [0, 1]; (...,) -> (..., num_features)."""
    exponents = torch.arange(num_features // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * FULL_TURN
    angles = angles / TEMPERATURE ** (2 * exponents / num_features)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def encode_cells(shape: Sequence[int], width: int, *, device: torch.device) -> Tensor:
    """Encodings of the centres of a level's cells in C order; (d, h, w) -> (d*h*w, width)."""
    per_axis = 2 * (width // 6)
    centres = cell_centres(shape, device=device)  # (cells, 3)
    features = sine_features(centres, per_axis).flatten(1)
    return torch.nn.functional.pad(features, (0, width - features.shape[1]))


def cell_centres(shape: Sequence[int], *, device: torch.device) -> Tensor:
    """Centres (z, y, x) of cells as parts of the extent, in C order; (d, h, w) -> (d*h*w, 3)."""
    axes = [(torch.arange(size, device=device) + 0.5) / size for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)

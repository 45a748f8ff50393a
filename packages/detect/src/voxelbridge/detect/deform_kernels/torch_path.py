"""Deformable attention from torch's own operators: runs, traces and exports everywhere."""

import torch
from torch import Tensor
from torch.nn import functional as F

BILINEAR, ZEROS = 0, 0  # torch's numbers of the interpolation and of the padding
FAR = 3.0  # grid coordinate beyond which every level of any size reads nothing but zeros


def sample_levels(
    value: Tensor, shapes: tuple[tuple[int, int, int], ...], locations: Tensor, weights: Tensor
) -> Tensor:
    """`deformable_attention_3d` by one grid_sample per level.

    Keeps the sampled points of each level for the gradient: 4 bytes x N x M x D x Q x P a level.
    """
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    # Far points are clamped: grid_sample turns coordinates into integers before it looks at them.
    grids = (2 * locations - 1).clamp(-FAR, FAR)
    parts = []
    for level, maps in enumerate(_maps(value, shapes)):
        sampled = F.grid_sample(
            maps, _per_head(grids, level), mode="bilinear", padding_mode="zeros",
            align_corners=False,
        ).squeeze(2)  # (N*M, D, Q, P)  # fmt: skip
        parts.append((sampled * _per_head(weights, level)).sum(dim=-1))
    out = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
    return out.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype).contiguous()


def sample_levels_backward(
    grad: Tensor,
    value: Tensor,
    shapes: tuple[tuple[int, int, int], ...],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, by hand: below autograd there is no tape."""
    batch, _, heads, channels = value.shape
    # (N, Q, M*D) -> (N*M, D, Q, 1)
    upstream = grad.to(locations.dtype).unflatten(2, (heads, channels)).permute(0, 2, 3, 1)
    upstream = upstream.flatten(0, 1).unsqueeze(-1)
    unclamped = 2 * locations - 1
    grids = unclamped.clamp(-FAR, FAR)
    of_value, of_grids, of_weights = [], [], []
    for level, maps in enumerate(_maps(value, shapes)):
        grid = _per_head(grids, level)
        sampled = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        ).squeeze(2)
        of_weights.append((upstream * sampled).sum(dim=1).unflatten(0, (batch, heads)))
        of_sampled = (upstream * _per_head(weights, level)).unsqueeze(2)
        of_maps, of_grid = torch.ops.aten.grid_sampler_3d_backward(
            of_sampled, maps, grid, BILINEAR, ZEROS, False, [True, True]
        )
        of_value.append(of_maps.flatten(2).unflatten(0, (batch, heads)))  # (N, M, D, cells)
        of_grids.append(of_grid.squeeze(1).unflatten(0, (batch, heads)))  # (N, M, Q, P, 3)
    moved = torch.stack(of_grids, dim=3).transpose(1, 2)  # (N, Q, M, L, P, 3)
    of_locations = torch.where(unclamped == grids, 2 * moved, torch.zeros_like(moved))
    return (
        torch.cat(of_value, dim=3).permute(0, 3, 1, 2).to(value.dtype).contiguous(),
        of_locations.contiguous(),
        torch.stack(of_weights, dim=3).transpose(1, 2).contiguous(),
    )


def _maps(value: Tensor, shapes: tuple[tuple[int, int, int], ...]) -> list[Tensor]:
    """Per level (N*M, D, d, h, w) in the wide type; channels first is grid_sample's layout."""
    batch, _, heads, channels = value.shape
    wide = value.to(torch.promote_types(value.dtype, torch.float32)).permute(0, 2, 3, 1)
    cells = wide.split([d * h * w for d, h, w in shapes], dim=3)
    return [
        level.reshape(batch * heads, channels, *shape)
        for level, shape in zip(cells, shapes, strict=True)
    ]


def _per_head(tensor: Tensor, level: int) -> Tensor:
    """(N, Q, M, L, P, ...) -> (N*M, 1, Q, P, ...)."""
    return tensor[:, :, :, level].transpose(1, 2).flatten(0, 1).unsqueeze(1)

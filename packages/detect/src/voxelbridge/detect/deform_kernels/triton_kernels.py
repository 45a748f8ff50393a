"""Deformable attention in Triton. Imported only where triton is wanted.

One program handles a block of queries for one head of one image; channels lie side by side, so a
corner of 16 bfloat16 channels is two 16-byte loads. Index arithmetic is done once for all channels.
Levels and points are real loops: unrolled, the compiler does not finish.
"""

# ruff: noqa: N803, ARG001 - constants are capitals in Triton; `query_bucket` is for the tuner alone
# triton's `static_range` exists in compiled code only:
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def locate(place_ptr, real, depth, height, width, WIDE: tl.constexpr):
    """Whether points read a level at all, their lowest corners and their parts of a cell."""
    x = tl.load(place_ptr, mask=real, other=-2.0).to(WIDE) * width - 0.5
    y = tl.load(place_ptr + 1, mask=real, other=-2.0).to(WIDE) * height - 0.5
    z = tl.load(place_ptr + 2, mask=real, other=-2.0).to(WIDE) * depth - 0.5
    # Masked before they become integers: far or NaN coordinates have none.
    inside = real & (x > -1) & (x < width) & (y > -1) & (y < height)
    inside = inside & (z > -1) & (z < depth)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    z = tl.where(inside, z, 0.0)
    low_x = tl.floor(x)
    low_y = tl.floor(y)
    low_z = tl.floor(z)
    return (
        inside,
        low_z.to(tl.int32),
        low_y.to(tl.int32),
        low_x.to(tl.int32),
        z - low_z,
        y - low_y,
        x - low_x,
    )


@triton.jit
def forward_kernel(
    value_ptr,  # (N, S, M, D)
    shapes_ptr,  # (L, 3) int64
    starts_ptr,  # (L,) int64
    locations_ptr,  # (N, Q, M, L, P, 3)
    weights_ptr,  # (N, Q, M, L, P)
    out_ptr,  # (N, Q, M, D)
    num_cells,
    num_queries,
    query_bucket,  # only the tuner looks at it
    M: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of two
    WIDE: tl.constexpr,  # type of the sums
    BLOCK_Q: tl.constexpr,
):
    """Writes the weighted sums of a block of queries."""
    m = tl.program_id(0) % M  # heads are neighbours: those of a cell share cache lines
    n = tl.program_id(1).to(tl.int64)
    q = (tl.program_id(0) // M).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = q < num_queries
    d = tl.arange(0, BLOCK_D)
    row = (n * num_queries + q) * M + m
    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=WIDE)
    for level in range(L):
        depth = tl.load(shapes_ptr + 3 * level).to(tl.int32)
        height = tl.load(shapes_ptr + 3 * level + 1).to(tl.int32)
        width = tl.load(shapes_ptr + 3 * level + 2).to(tl.int32)
        first = (n * num_cells + tl.load(starts_ptr + level)) * (M * D) + m * D
        for point in range(P):
            at = (row * L + level) * P + point
            weight = tl.load(weights_ptr + at, mask=real, other=0.0).to(WIDE)
            inside, z0, y0, x0, fz, fy, fx = locate(
                locations_ptr + 3 * at, real, depth, height, width, WIDE
            )
            for corner in tl.static_range(8):
                cz = z0 + ((corner >> 2) & 1)
                cy = y0 + ((corner >> 1) & 1)
                cx = x0 + (corner & 1)
                ok = inside & (cz >= 0) & (cz < depth) & (cy >= 0) & (cy < height)
                ok = ok & (cx >= 0) & (cx < width)
                cell = ((cz * height + cy) * width + cx).to(tl.int64) * (M * D)
                part = (
                    (fz if (corner >> 2) & 1 else 1 - fz)
                    * (fy if (corner >> 1) & 1 else 1 - fy)
                    * (fx if corner & 1 else 1 - fx)
                    * weight
                )
                read = tl.load(
                    value_ptr + first + cell[:, None] + d[None, :],
                    mask=ok[:, None] & (d[None, :] < D),
                    other=0.0,
                )
                total += read.to(WIDE) * part[:, None]
    tl.store(
        out_ptr + row[:, None] * D + d[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=real[:, None] & (d[None, :] < D),
    )


@triton.jit
def backward_kernel(
    grad_ptr,  # (N, Q, M, D)
    value_ptr,
    shapes_ptr,
    starts_ptr,
    locations_ptr,
    weights_ptr,
    scale_ptr,  # (1,): units of the integer sums per 1.0; read only when FIXED
    grad_value_ptr,  # (N, S, M, D) of zeros, in the wide type or int64
    grad_locations_ptr,
    grad_weights_ptr,
    num_cells,
    num_queries,
    query_bucket,
    M: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    FIXED: tl.constexpr,  # True: integer sums, which do not depend on the order of addition
    BLOCK_Q: tl.constexpr,
):
    """Writes gradients of locations and weights, adds those of values atomically."""
    m = tl.program_id(0) % M
    n = tl.program_id(1).to(tl.int64)
    q = (tl.program_id(0) // M).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = q < num_queries
    d = tl.arange(0, BLOCK_D)
    row = (n * num_queries + q) * M + m
    grad = tl.load(
        grad_ptr + row[:, None] * D + d[None, :],
        mask=real[:, None] & (d[None, :] < D),
        other=0.0,
    ).to(WIDE)
    if FIXED:
        scale = tl.load(scale_ptr)
    for level in range(L):
        depth = tl.load(shapes_ptr + 3 * level).to(tl.int32)
        height = tl.load(shapes_ptr + 3 * level + 1).to(tl.int32)
        width = tl.load(shapes_ptr + 3 * level + 2).to(tl.int32)
        first = (n * num_cells + tl.load(starts_ptr + level)) * (M * D) + m * D
        for point in range(P):
            at = (row * L + level) * P + point
            weight = tl.load(weights_ptr + at, mask=real, other=0.0).to(WIDE)
            inside, z0, y0, x0, fz, fy, fx = locate(
                locations_ptr + 3 * at, real, depth, height, width, WIDE
            )
            of_weight = tl.zeros([BLOCK_Q], dtype=WIDE)
            of_x = tl.zeros([BLOCK_Q], dtype=WIDE)
            of_y = tl.zeros([BLOCK_Q], dtype=WIDE)
            of_z = tl.zeros([BLOCK_Q], dtype=WIDE)
            for corner in tl.static_range(8):
                cz = z0 + ((corner >> 2) & 1)
                cy = y0 + ((corner >> 1) & 1)
                cx = x0 + (corner & 1)
                ok = inside & (cz >= 0) & (cz < depth) & (cy >= 0) & (cy < height)
                ok = ok & (cx >= 0) & (cx < width)
                cell = ((cz * height + cy) * width + cx).to(tl.int64) * (M * D)
                place = first + cell[:, None] + d[None, :]
                valid = ok[:, None] & (d[None, :] < D)
                read = tl.load(value_ptr + place, mask=valid, other=0.0).to(WIDE)
                dot = tl.sum(read * grad, axis=1)
                pz = fz if (corner >> 2) & 1 else 1 - fz
                py = fy if (corner >> 1) & 1 else 1 - fy
                px = fx if corner & 1 else 1 - fx
                of_weight += pz * py * px * dot
                of_z += (py * px * dot) if (corner >> 2) & 1 else -(py * px * dot)
                of_y += (pz * px * dot) if (corner >> 1) & 1 else -(pz * px * dot)
                of_x += (pz * py * dot) if corner & 1 else -(pz * py * dot)
                share = grad * (pz * py * px * weight)[:, None]
                if FIXED:
                    units = tl.floor(share * scale + 0.5).to(tl.int64)
                    tl.atomic_add(grad_value_ptr + place, units, mask=valid, sem="relaxed")
                else:
                    tl.atomic_add(grad_value_ptr + place, share, mask=valid, sem="relaxed")
            tl.store(grad_weights_ptr + at, of_weight, mask=real)
            tl.store(grad_locations_ptr + 3 * at, of_x * weight * width, mask=real)
            tl.store(grad_locations_ptr + 3 * at + 1, of_y * weight * height, mask=real)
            tl.store(grad_locations_ptr + 3 * at + 2, of_z * weight * depth, mask=real)

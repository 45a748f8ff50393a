"""Random numbers that depend on a seed and a position alone, the same on every device.

A torch.Generator gives other numbers on another device, and its seed has to leave the device
first. Here number i of a seed is a hash of both: i is mixed with one half of the seed, then with
the other. Shifts and factors are those of triple32 (https://github.com/skeeto/hash-prospector).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_FACTORS = (0xED5AD4BB - 2**32, 0xAC4C1B51 - 2**32, 0x31848BAB)  # as int32


def draw_seed(rng: np.random.Generator) -> NDArray[np.int32]:
    """A seed (2,) of 64 bits."""
    return rng.integers(-(2**31), 2**31, size=2, dtype=np.int32)


def random_bits(seeds: Tensor, count: int) -> Tensor:
    """Numbers 0 .. count - 1 of each seed; (B, 2) int32 -> (B, count) int32, all 32 bits random.

    No number of one seed comes twice.
    """
    bits = torch.arange(count, dtype=torch.int32, device=seeds.device) ^ seeds[:, :1]
    _fold(bits, 17).mul_(_FACTORS[0]).bitwise_xor_(seeds[:, 1:])
    _fold(bits, 11).mul_(_FACTORS[1])
    _fold(bits, 15).mul_(_FACTORS[2])
    return _fold(bits, 14)


def uniform(seeds: Tensor, count: int) -> Tensor:
    """The same numbers as multiples of 2^-24 in [0, 1), (B, count) float32."""
    bits = random_bits(seeds, count).bitwise_right_shift_(8).bitwise_and_(0xFFFFFF)
    return bits.to(torch.float32).mul_(2.0**-24)


def _fold(bits: Tensor, places: int) -> Tensor:
    """In place, bits ^= bits >> places, shifting in zeros (int32 would repeat the sign)."""
    return bits.bitwise_xor_((bits >> places).bitwise_and_(2 ** (32 - places) - 1))

"""Dropout masks that any row can ask for again: counter-based bits instead of stored masks.

Bits of word w of row i are SplitMix64's output function of seed + (i * words + w) [1], the same on
every device. A mask costs an eighth to a fortieth of `bernoulli_`, which draws serially on a CPU.

[1] Steele, Lea, Flood: Fast splittable pseudorandom number generators. OOPSLA 2014.

R rows, C columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
LANES = ((torch.uint8, 8), (torch.int16, 16), (torch.int32, 32))  # widths of a random number


def random_words(counters: Tensor) -> Tensor:
    """SplitMix64 of int64 counters, in place: 64 random bits each."""
    z = counters.mul_(GOLDEN)
    shifted = torch.empty_like(z)
    for shift, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # a logical shift of signed numbers
        z *= factor
    return z


@dataclass(frozen=True, slots=True)
class Keep:
    """Which entries of an (M, C) matrix survive dropout: each with probability `keep`.

    Exact where keep is a multiple of 1/256 or 1/65536, else within 2^-33.
    """

    keep: float
    columns: int
    seed: int

    @classmethod
    def draw(cls, keep: float, columns: int) -> "Keep":
        """A mask whose seed comes from torch's CPU generator."""
        return cls(keep, columns, int(torch.randint(2**62, ())))

    def rows(self, rows: Tensor) -> Tensor:
        """Mask of rows (R,) int64: (R, C) of an integer type, 1 or 0, on their device.

        Integers, because multiplying by them is four times faster on a CPU than by booleans.
        """
        dtype, bits = next((d, b) for d, b in LANES if b == 32 or (self.keep * 2**b).is_integer())
        words = -(-self.columns * bits // 64)
        counters = torch.arange(words, device=rows.device) + (rows * words + self.seed)[:, None]
        lanes = random_words(counters).view(dtype)[:, : self.columns]
        threshold = round(self.keep * 2**bits)
        if dtype != torch.uint8:  # signed numbers start at -2^(bits - 1)
            threshold -= 2 ** (bits - 1)
        return lanes.lt_(threshold)

"""Matrices of low rank without forming them: norms, spectra, the nearest matrix of a rank.

With up = Qu Ru and down' = Qd Rd (QR), up down = Qu (Ru Rd') Qd', so that the core Ru Rd', R x R, has every singular
value of the whole. All of it is computed in float64.

Shapes: O outputs, I inputs, R rank, K the rank that is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_UP_TO = 512
"""Dense matrices with a side no longer than this are decomposed whole; larger ones by a randomised range finder."""
OVERSAMPLING = 32
POWER_ITERATIONS = 6
NEGLIGIBLE = 1e-9
"""A singular value below this share of the largest is what float64 leaves of a zero."""


@dataclass(frozen=True, slots=True)
class Factors:
    """`up_OR @ down_RI`, the scaling of the adapter included."""

    up_OR: Tensor
    down_RI: Tensor

    @property
    def rank(self) -> int:
        """R, whatever the numerical rank."""
        return self.down_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """O and I."""
        return self.up_OR.shape[0], self.down_RI.shape[1]

    def scaled(self, weight: float) -> Factors:
        """`weight` times the same."""
        return Factors(self.up_OR * weight, self.down_RI)

    def dense(self) -> Tensor:
        """[O, I] in float32."""
        return (self.up_OR.double() @ self.down_RI.double()).float()


Delta = Factors | Tensor
"""What an adapter adds to one weight: as factors, or as a matrix [O, I] where the method has none."""


def shape_of(delta: Delta) -> tuple[int, int]:
    """O and I."""
    return delta.shape if isinstance(delta, Factors) else (delta.shape[0], delta.shape[1])


def dense(delta: Delta) -> Tensor:
    """[O, I] in float32."""
    return delta.dense() if isinstance(delta, Factors) else delta


def total(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The weighted sum: factors side by side while all parts have factors, else a matrix."""
    factors = [delta for delta in deltas if isinstance(delta, Factors)]
    if len(factors) < len(deltas):
        return torch.stack([dense(delta) * weight for delta, weight in zip(deltas, weights, strict=True)]).sum(0)
    scaled = [one.scaled(weight) for one, weight in zip(factors, weights, strict=True)]
    return Factors(torch.cat([one.up_OR for one in scaled], 1), torch.cat([one.down_RI for one in scaled], 0))


def spectrum(delta: Delta) -> Tensor:
    """The singular values, largest first, in float64; at most R of them for factors."""
    if isinstance(delta, Factors):
        _, up_RR = torch.linalg.qr(delta.up_OR.double())
        _, down_RR = torch.linalg.qr(delta.down_RI.double().T)
        core_RR: Tensor = up_RR @ down_RR.T
    else:
        core_RR = delta.double()
    singular: Tensor = torch.linalg.svdvals(core_RR)
    return singular


def norm(delta: Delta) -> float:
    """The Frobenius norm."""
    return float(spectrum(delta).norm()) if isinstance(delta, Factors) else float(delta.double().norm())


def distance(one: Delta, other: Delta) -> float:
    """The Frobenius norm of the difference, without the cancellation of |a|^2 - 2 a.b + |b|^2."""
    return norm(total([one, other], [1.0, -1.0]))


def inner(one: Delta, other: Delta) -> float:
    """The sum of elementwise products."""
    if isinstance(one, Factors) and isinstance(other, Factors):
        ups_RR = one.up_OR.double().T @ other.up_OR.double()
        downs_RR = one.down_RI.double() @ other.down_RI.double().T
        return float((ups_RR * downs_RR).sum())
    return float((dense(one).double() * dense(other).double()).sum())


def effective_rank(singular: Tensor) -> float:
    """How many directions carry the delta: the participation ratio (sum s^2)^2 / sum s^4; 0 for a zero delta."""
    power = singular.double().square()
    return float(power.sum().square() / power.square().sum()) if float(power.sum()) > 0 else 0.0


def numerical_rank(singular: Tensor) -> int:
    """How many singular values are not zero up to float64's rounding."""
    return int((singular > NEGLIGIBLE * singular[0]).sum()) if len(singular) and float(singular[0]) > 0 else 0


def nearest(delta: Delta, rank: int) -> Factors:
    """The nearest matrix of that rank (Eckart and Young 1936), its singular values shared evenly by both factors.

    Exact for factors and for small matrices. Large ones go through a range finder with power iterations (Halko et al.
    2011, arXiv:0909.4061, algorithm 4.4); what it loses is measured by whoever asks, never assumed.
    """
    left_OK, singular_K, right_KI = _decompose(delta, rank)
    root_K = singular_K[:rank].sqrt()
    return Factors(left_OK[:, :rank] * root_K, root_K[:, None] * right_KI[:rank])


def padded(factors: Factors, rank: int) -> Factors:
    """The same matrix with zeros up to that rank."""
    more = rank - factors.rank
    return Factors(
        torch.nn.functional.pad(factors.up_OR, (0, more)), torch.nn.functional.pad(factors.down_RI, (0, 0, 0, more))
    )


def _decompose(delta: Delta, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [O, K], singular values [K], right vectors [K, I], with K of `rank` or more where there are such."""
    if isinstance(delta, Factors):
        left_OR, up_RR = torch.linalg.qr(delta.up_OR.double())
        right_IR, down_RR = torch.linalg.qr(delta.down_RI.double().T)
        inner_left, singular, inner_right = torch.linalg.svd(up_RR @ down_RR.T, full_matrices=False)
        return left_OR @ inner_left, singular, inner_right @ right_IR.T
    shortest = min(delta.shape)
    if shortest <= EXACT_UP_TO or 2 * (rank + OVERSAMPLING) >= shortest:
        left, singular, right = torch.linalg.svd(delta.double(), full_matrices=False)
        return left, singular, right
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, singular, right_IK = torch.svd_lowrank(delta, q=rank + OVERSAMPLING, niter=POWER_ITERATIONS)
    return left.double(), singular.double(), right_IK.T.double()


def root_sum_square(values: Sequence[float]) -> float:
    """The norm of several matrices taken together, from their norms."""
    return math.sqrt(math.fsum(value * value for value in values))

"""The deltas of several adapters become those of one, module by module, with what is lost on the way.

**Deltas** is the space that the papers speak of: each part's change of a weight, whatever its rank or method. linear,
svd and cat are then the weighted sum: in as few ranks as hold it, in a rank that is asked for, or with the factors side
by side. The others prune each delta first, and the nearest matrix of a rank is kept. **Factors** is what PEFT does by
default where all ranks are equal: A and B are combined apart, each with the root of the weight. No delta is formed, but
(B1 + B2) (A1 + A2) has B1 A2 and B2 A1 in it too, which no part was trained with; the error says how much they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch

from peftkit.deploy.arithmetic import DRAWS, ELECTS, Arithmetic, combine_tensors
from peftkit.deploy.lowrank import (
    Delta,
    Factors,
    dense,
    distance,
    nearest,
    norm,
    numerical_rank,
    padded,
    root_sum_square,
    shape_of,
    spectrum,
    total,
)
from peftkit.errors import BackboneError, InputError

How = Literal["linear", "svd", "ties", "dare", "dare-ties", "magnitude", "cat"]
Space = Literal["deltas", "factors"]
SUMS = ("linear", "svd", "cat")
DENSITY = 0.5
"""The share of entries kept where it is not said."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How adapters are combined.

    Attributes:
        weights: one a part; negative ones subtract. None: equal, adding up to 1, or 1 each for what averages itself.
        density: the share of entries that pruning keeps; None where nothing is pruned.
        rank: of the result; None: what holds the sum (linear), the sum of ranks (cat), else the largest part's.
        seed: of what is drawn at random.
    """

    how: How = "linear"
    weights: tuple[float, ...] | None = None
    space: Space = "deltas"
    density: float | None = None
    rank: int | None = None
    seed: int | None = None

    def settled(self, count: int, *, searched: bool = False) -> Mix:
        """The same with every default filled in, for so many parts.

        Raises:
            InputError: a number that makes no sense, or a setting that would be ignored.
        """
        weights = self.weights or tuple([1.0 if self.how in ELECTS else 1 / count] * count)
        if len(weights) != count:
            raise InputError(f"--weights has {len(weights)} numbers for {count} adapters. Give one for each.")
        if not all(map(math.isfinite, weights)) or not any(weights):
            raise InputError(f"--weights {weights} has no use: they must be finite, and not all zero.")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"--density {self.density} is no share: it must be above 0 and at most 1.")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"--rank {self.rank} is no rank: it must be 1 or more.")
        ignored = {
            "--density": self.density is not None and self.how in SUMS,
            "--seed": self.seed is not None and self.how not in DRAWS and not searched,
            "--rank": self.rank is not None and (self.how == "cat" or self.space == "factors"),
            "--space factors": self.space == "factors" and self.how in ("svd", "cat"),
            "--weights": self.weights is not None and searched,
        }
        for flag in (flag for flag, is_ignored in ignored.items() if is_ignored):
            by = "--search, which finds them" if flag == "--weights" else f"--how {self.how}"
            by += " in factors, which keeps the rank" if flag == "--rank" and self.space == "factors" else ""
            raise InputError(f"{flag} would be ignored by {by}. Leave it out, or choose another --how.")
        density = None if self.how in SUMS else DENSITY if self.density is None else self.density
        return replace(self, weights=weights, density=density, seed=self.seed or 0)


@dataclass(frozen=True, slots=True)
class Ingredient:
    """One part, as the arithmetic sees it.

    Attributes:
        name: for messages.
        digest: of its file; what is drawn for it does not depend on the order of the parts.
        deltas: what it adds to each module's weight.
        unscaled: B and A as trained; empty where there are none.
        scalings: of each module that `unscaled` has.
    """

    name: str
    digest: str
    deltas: Mapping[str, Delta]
    unscaled: Mapping[str, Factors]
    scalings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Mixed:
    """The factors of the result, all of one rank, and how far they are from what was asked for.

    Attributes:
        errors: by module, the norm of what is missing over the norm of the exact result; absent where that is zero or,
            in factors, not defined.
        error: the same over all modules.
    """

    factors: Mapping[str, Factors]
    rank: int
    errors: Mapping[str, float]
    error: float | None


def mix(parts: Sequence[Ingredient], how: Mix, *, dtype: torch.dtype = torch.float32, least_rank: int = 1) -> Mixed:
    """Combine parts by a settled `Mix`.

    Args:
        dtype: what the result is held in; its rounding is part of the error.
        least_rank: zeros are added up to it.

    Raises:
        InputError: the parts cannot be combined in this way.
        BackboneError: they change weights of different shapes.
    """
    paths = sorted({path for part in parts for path in part.deltas})
    _check_shapes(parts, paths)
    written: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    lost, wanted = [], []
    for path in paths:
        exact, factors = _mix_factors(parts, how, path) if how.space == "factors" else _mix_deltas(parts, how, path)
        written[path] = kept = Factors(factors.up_OR.to(dtype), factors.down_RI.to(dtype))
        if exact is not None and (size := norm(exact)) > 0:
            wanted.append(size)
            lost.append(distance(exact, kept))
            errors[path] = lost[-1] / size
    rank = max(least_rank, *(factors.rank for factors in written.values()))
    error = root_sum_square(lost) / root_sum_square(wanted) if wanted else None
    return Mixed({path: padded(factors, rank) for path, factors in written.items()}, rank, errors, error)


def highest_rank(parts: Sequence[Ingredient], how: Mix) -> int:
    """The rank that holds any combination of the parts, whatever their weights."""
    if how.how in ("linear", "cat") and how.space == "deltas" and how.rank is None:
        return max(sum(_rank_of(part, path) for part in parts) for path in {p for part in parts for p in part.deltas})
    return how.rank or _largest_rank(parts)


def _mix_deltas(parts: Sequence[Ingredient], how: Mix, path: str) -> tuple[Delta, Factors]:
    """The exact result for one module, and the factors that are kept of it."""
    here = [(part, weight) for part, weight in zip(parts, how.weights or (), strict=True) if path in part.deltas]
    deltas, weights = [part.deltas[path] for part, _ in here], [weight for _, weight in here]
    if how.how in SUMS:
        exact = total(deltas, weights)
        if how.how == "cat":
            if not isinstance(exact, Factors):
                raise InputError("--how cat needs parts with factors. For others, --how svd --rank R is the nearest.")
            return exact, exact
        if how.how == "linear" and how.rank is None and isinstance(exact, Factors):
            return exact, nearest(exact, numerical_rank(spectrum(exact)))
    else:
        seeds = [_seed(how, path, part.digest) for part, _ in here]
        exact = combine_tensors(
            _arithmetic(how), list(map(dense, deltas)), weights, density=how.density or 1.0, seeds=seeds
        )
    return exact, nearest(exact, how.rank or _largest_rank(parts))


def _mix_factors(parts: Sequence[Ingredient], how: Mix, path: str) -> tuple[Delta | None, Factors]:
    """B and A combined apart, as PEFT does; the exact weighted sum beside them where that is what is asked for."""
    here = [(part, weight) for part, weight in zip(parts, how.weights or (), strict=True) if path in part.deltas]
    for part, _ in here:
        if path not in part.unscaled or part.unscaled[path].rank != here[0][0].unscaled[path].rank:
            raise InputError(
                f"--space factors needs plain LoRA parts of one rank, and {part.name} is none, or of another rank, at "
                f"{path}. Leave --space out: deltas can be combined whatever their rank."
            )
    scaled = [weight * part.scalings[path] for part, weight in here]
    roots = [math.sqrt(abs(weight)) for weight in scaled]
    ups = [part.unscaled[path].up_OR.float() for part, _ in here]
    downs = [part.unscaled[path].down_RI.float() for part, _ in here]
    arithmetic, density = _arithmetic(how), how.density or 1.0
    up = combine_tensors(
        arithmetic, ups, roots, density=density, seeds=[_seed(how, path, part.digest, "up") for part, _ in here]
    )
    down = combine_tensors(
        arithmetic,
        downs,
        [math.copysign(root, weight) for root, weight in zip(roots, scaled, strict=True)],
        density=density,
        seeds=[_seed(how, path, part.digest, "down") for part, _ in here],
    )
    exact = total([part.deltas[path] for part, _ in here], [weight for _, weight in here])
    return (exact if arithmetic == "linear" else None), Factors(up, down)


def _arithmetic(how: Mix) -> Arithmetic:
    assert how.how not in SUMS or how.how == "linear", "svd and cat are sums of deltas"
    return cast(Arithmetic, how.how)


def _check_shapes(parts: Sequence[Ingredient], paths: Sequence[str]) -> None:
    for path in paths:
        shapes = {part.name: tuple(shape_of(part.deltas[path])) for part in parts if path in part.deltas}
        if len(set(shapes.values())) > 1:
            told = ", ".join(f"{name} {rows} x {columns}" for name, (rows, columns) in shapes.items())
            raise BackboneError(
                f"the adapters change {path} in different shapes ({told}): they belong to different bases. "
                "Only adapters of one base can be combined."
            )


def _largest_rank(parts: Sequence[Ingredient]) -> int:
    """The largest rank of any part at any module.

    Raises:
        InputError: a part has no rank.
    """
    for part in parts:
        if any(not isinstance(delta, Factors) for delta in part.deltas.values()):
            raise InputError(f"{part.name} has no rank of its own, so the result's has to be said: --rank 16.")
    return max(_rank_of(part, path) for part in parts for path in part.deltas)


def _rank_of(part: Ingredient, path: str) -> int:
    delta = part.deltas.get(path)
    if delta is None:
        return 0
    return delta.rank if isinstance(delta, Factors) else min(delta.shape)


def _seed(how: Mix, path: str, *words: str) -> int:
    """A seed of its own for each module of each part, so that no order matters."""
    text = "\n".join([str(how.seed), path, *words])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

"""A LoRA of another rank: the nearest smaller one, or one with room to train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from peftkit import __version__
from peftkit.deploy.adapter import INSIDE
from peftkit.deploy.exams import ScoreRow, open_exams, score_adapter
from peftkit.deploy.lowrank import Factors, distance, nearest, norm, root_sum_square
from peftkit.deploy.parts import DOWN, MAGNITUDE, UP, Adapter, read_adapter, require_free, write_adapter
from peftkit.errors import MethodError
from peftkit.files import staged_folder, write_json
from peftkit.recipe import Recipe
from peftkit.record import Part

REPORT_NAME = "resize_report.json"


class ResizedModule(Part):
    """One module. `error` is the norm of what was cut off B A over the norm of B A; absent where that is zero."""

    path: str
    rank: int
    error: float | None = None


class ResizeReport(Part):
    """What was made of what, and what it lost; `error` is over all modules."""

    peftkit_version: str
    source: str
    digest: str
    rank: int
    ranks_before: tuple[int, ...]
    num_params_before: int
    num_params: int
    error: float | None = None
    modules: tuple[ResizedModule, ...]
    notes: tuple[str, ...] = ()
    scores: tuple[ScoreRow, ...] = ()


@dataclass(frozen=True, slots=True)
class _Resized:
    """The new factors of a module, unscaled, in the dtype they had."""

    factors: Factors
    error: float
    size: float


def resize(
    path: str | Path,
    out: str | Path,
    *,
    rank: int,
    on: Sequence[Recipe] = (),
    base: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ResizeReport:
    """Write the adapter of a run or adapter folder with that rank at every module into `out`; return its report.

    Smaller is the nearest (by SVD); larger adds columns of zeros to B and random rows to A, so that the function is the
    same and the new ranks can be trained. The scaling alpha / rank stays what it is at each module.

    Args:
        on: recipes to score before and after on, on their validation splits.
        base: the base's name for scoring, where the adapter doesn't know it or it has moved.

    Raises:
        InputError: no LoRA adapter, a rank that makes no sense, an output in use.
    """
    out = Path(out).absolute()
    require_free(out)
    adapter = read_adapter(path)
    _check(adapter, rank)
    exams, _ = open_exams(on, required=True)
    resized = {name: _resize(adapter, name, rank) for name in adapter.unscaled}
    tensors = dict(adapter.tensors)
    for name, made in resized.items():
        tensors[INSIDE + name + DOWN], tensors[INSIDE + name + UP] = made.factors.down_RI, made.factors.up_OR
    sizes = [made.size for made in resized.values()]
    lost = root_sum_square([made.error for made in resized.values()])
    notes = []
    if adapter.impurity is not None:
        notes.append(f"{adapter.impurity}; the error is that of B A")
    with staged_folder(out) as staging:
        config = _config(adapter, rank)
        write_adapter(staging, config, tensors, head=adapter.head, origin=adapter, identity=adapter.identity)
        rows = []
        for name, folder in (("before", adapter.path), ("after", staging)) if exams else ():
            say(f"scoring {name} on {', '.join(exam.label for exam in exams)}")
            rows.append(score_adapter(folder, exams, name=name, split="validation", base=base))
        report = ResizeReport(
            peftkit_version=__version__,
            source=str(path),
            digest=adapter.digest,
            rank=rank,
            ranks_before=tuple(sorted({factors.rank for factors in adapter.unscaled.values()})),
            num_params_before=sum(tensor.numel() for tensor in adapter.tensors.values()),
            num_params=sum(tensor.numel() for tensor in tensors.values()),
            error=lost / root_sum_square(sizes) if any(sizes) else None,
            modules=tuple(
                ResizedModule(
                    path=name,
                    rank=adapter.unscaled[name].rank,
                    error=made.error / made.size if made.size else None,
                )
                for name, made in resized.items()
            ),
            notes=tuple(notes),
            scores=tuple(rows),
        )
        write_json(staging / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
    return report


def _check(adapter: Adapter, rank: int) -> None:
    magnitudes = set(adapter.odd_fields) == {"use_dora"} and all(
        name in adapter.saved or name.endswith(MAGNITUDE) for name in adapter.beyond
    )
    if adapter.impurity is not None and (adapter.rewrites_base or not magnitudes):
        raise MethodError(
            f"{adapter.path} cannot be resized: {adapter.impurity}, and that depends on its rank. What can be "
            "folded into its base, `peftkit combine` makes a plain LoRA of: --how svd --rank R."
        )
    highest = max(min(factors.shape) for factors in adapter.unscaled.values())
    if not 1 <= rank <= highest:
        raise MethodError(f"--rank {rank} makes no sense: the matrices that it changes have ranks 1 to {highest}.")


def _resize(adapter: Adapter, path: str, rank: int) -> _Resized:
    """B and A of one module at the new rank; the loss is measured on what is written, its scaling left out."""
    before = adapter.unscaled[path]
    if rank >= before.rank:
        made = _grown(before, rank, path)
    else:
        cut = nearest(before, rank)
        made = Factors(cut.up_OR.to(before.up_OR.dtype), cut.down_RI.to(before.down_RI.dtype))
    scaling = adapter.scaling(path)
    return _Resized(made, scaling * distance(before, made), scaling * norm(before))


def _grown(before: Factors, rank: int, path: str) -> Factors:
    """The same product with more ranks: zeros in B, and in A what PEFT starts with, by a fixed seed."""
    more, width = rank - before.rank, before.down_RI.shape[1]
    generator = torch.Generator().manual_seed(sum(path.encode()))
    rows_RI = torch.empty(more, width, dtype=torch.float32)
    if more:
        torch.nn.init.kaiming_uniform_(rows_RI, a=math.sqrt(5), generator=generator)
    columns_OR = before.up_OR.new_zeros(before.up_OR.shape[0], more)
    return Factors(
        torch.cat([before.up_OR, columns_OR], 1), torch.cat([before.down_RI, rows_RI.to(before.down_RI.dtype)], 0)
    )


def _config(adapter: Adapter, rank: int) -> Any:
    """The configuration with the new rank, and the alpha that leaves each module's scaling what it is."""
    divisor = math.sqrt(rank) if adapter.config.use_rslora else rank
    alphas = {path: _as_integer(adapter.scaling(path) * divisor) for path in adapter.unscaled}
    common = max(alphas.values(), key=list(alphas.values()).count)
    return replace(
        adapter.config,
        r=rank,
        lora_alpha=common,
        rank_pattern={},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != common},
    )


def _as_integer(alpha: float) -> float:
    """Alpha as PEFT writes it, an integer wherever it is one."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(1.0, alpha) else alpha

"""Linear layers with their LoRA updates as one differentiable operation over an input that they share.

`y_i = x W_i^T + b_i + s_i drop_i(x) A_i^T B_i^T` for the layers i of a group (Hu et al. 2021, arXiv:2106.09685).
Products run in the dtype of `x`; A and B are rounded to it where they are used, and their gradients leave in their own.

Shapes: N tokens, K inputs, M outputs, R rank, S the ranks of a group together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftkit.kernels.autograd import apply


@dataclass(frozen=True, slots=True)
class Term:
    """One layer of a group: what makes its output.

    Attributes:
        weight: [M, K], frozen; packed in 4 bits when there is a `quant_state`.
        bias: [M].
        down: A, [R, K].
        up: B, [M, R].
        scale: s.
        mask: True where the layer's dropout keeps an input, [N, K]; None keeps all.
        kept: the probability that the mask was drawn with.
        quant_state: of bitsandbytes.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scale: float
    mask: Tensor | None = None
    kept: float = 1.0
    quant_state: Any = None

    def weight_MK(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight for one product; a quantized one is unpacked anew each time, and never kept."""
        if self.quant_state is None:
            return self.weight
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(self.weight, self.quant_state)
        return unpacked.to(dtype)

    def down_RK(self, dtype: torch.dtype) -> Tensor:
        """A, divided by the probability to be kept."""
        return (self.down if self.mask is None else self.down / self.kept).to(dtype)

    def up_MR(self, dtype: torch.dtype) -> Tensor:
        """B, times the scale before it is rounded."""
        return (self.up * self.scale).to(dtype)

    def dropped(self, x_NK: Tensor) -> Tensor:
        """What dropout leaves, unscaled."""
        if self.mask is None:
            return x_NK
        # as bytes: torch converts them to floats in vectors, booleans one by one
        return self.mask.view(torch.int8).to(x_NK.dtype).mul_(x_NK)


def lora_linear(x: Tensor, terms: Sequence[Term]) -> list[Tensor]:
    """Outputs [..., M] of the layers of a group, given the input [..., K] of all of them."""
    tensors = [tensor for term in terms for tensor in (term.weight, term.bias, term.down, term.up, term.mask)]
    constants = [(term.scale, term.kept, term.quant_state) for term in terms]
    outputs = apply(_LoraLinear, x.reshape(-1, x.shape[-1]), constants, *tensors)
    return [y_NM.view(*x.shape[:-1], y_NM.shape[-1]) for y_NM in outputs]


class _LoraLinear(torch.autograd.Function):
    """The formula over a group. Besides parameters it saves `x`, `x A^T` and the masks."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, constants: list[Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        terms = _terms(constants, tensors)
        z_NS = _project(x_NK, terms)
        outputs = []
        for term, z_NR in zip(terms, _by_rank(z_NS, terms), strict=True):
            up_RM = term.up_MR(x_NK.dtype).T
            y_NM = z_NR @ up_RM if term.bias is None else torch.addmm(term.bias.to(x_NK.dtype), z_NR, up_RM)
            # the large product comes last and adds in its accumulator: one rounding of the sum, one pass over it less
            outputs.append(y_NM.addmm_(x_NK, term.weight_MK(x_NK.dtype).T))
        ctx.save_for_backward(x_NK, z_NS, *tensors)
        ctx.constants = constants
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x_NK, z_NS, *tensors = ctx.saved_tensors
        terms = _terms(ctx.constants, tensors)
        u_NS = _back_project(dy, terms, z_NS)
        dx_NK = _input_gradient(dy, terms, u_NS) if ctx.needs_input_grad[0] else None
        downs: Sequence[Tensor | None] = [None] * len(terms)
        if any(ctx.needs_input_grad[4::5]):
            downs = _down_gradients(x_NK, terms, u_NS)
        gradients: list[Tensor | None] = []
        for index, (term, dy_NM, z_NR) in enumerate(zip(terms, dy, _by_rank(z_NS, terms), strict=True)):
            _, bias, down, up, _ = ctx.needs_input_grad[2 + 5 * index : 7 + 5 * index]
            if dy_NM is None:
                gradients += [None] * 5
                continue
            bias_M = dy_NM.sum(0).to(term.bias.dtype) if bias and term.bias is not None else None
            up_MR = (z_NR.T @ dy_NM).T.to(term.up.dtype).contiguous().mul_(term.scale) if up else None
            gradients += [None, bias_M, downs[index] if down else None, up_MR, None]
        return dx_NK, None, *gradients


def _terms(constants: list[Any], tensors: Sequence[Any]) -> list[Term]:
    """The terms again, from what autograd carries of them."""
    made = []
    for index, (scale, kept, quant_state) in enumerate(constants):
        weight, bias, down, up, mask = tensors[5 * index : 5 * index + 5]
        made.append(Term(weight, bias, down, up, scale, mask, kept, quant_state))
    return made


def _by_rank(t_NS: Tensor, terms: Sequence[Term]) -> tuple[Tensor, ...]:
    return torch.split(t_NS, [term.down.shape[0] for term in terms], dim=1)


def _masked(terms: Sequence[Term]) -> bool:
    return any(term.mask is not None for term in terms)


def _stacked_SK(terms: Sequence[Term], dtype: torch.dtype) -> Tensor:
    return torch.cat([term.down_RK(dtype) for term in terms])


def _project(x_NK: Tensor, terms: Sequence[Term]) -> Tensor:
    """`drop_i(x) A_i^T` of all layers, side by side [N, S]."""
    if not _masked(terms):
        return x_NK @ _stacked_SK(terms, x_NK.dtype).T
    return torch.cat([term.dropped(x_NK) @ term.down_RK(x_NK.dtype).T for term in terms], dim=1)


def _back_project(dy: Sequence[Tensor | None], terms: Sequence[Term], z_NS: Tensor) -> Tensor:
    """`s_i dy_i B_i` of all layers, side by side [N, S]; zero where an output was not used."""
    u_NS = torch.zeros_like(z_NS)
    for dy_NM, term, u_NR in zip(dy, terms, _by_rank(u_NS, terms), strict=True):
        if dy_NM is not None:
            torch.mm(dy_NM, term.up_MR(dy_NM.dtype), out=u_NR)
    return u_NS


def _input_gradient(dy: Sequence[Tensor | None], terms: Sequence[Term], u_NS: Tensor) -> Tensor:
    """Sum over the layers of `dy_i W_i + drop_i(u_i A_i)` [N, K]."""
    if not _masked(terms):
        dx_NK = u_NS @ _stacked_SK(terms, u_NS.dtype)
    else:
        parts = zip(terms, _by_rank(u_NS, terms), strict=True)
        first, *others = (term.dropped(u_NR @ term.down_RK(u_NR.dtype)) for term, u_NR in parts)
        dx_NK = first
        for other in others:
            dx_NK += other
    for dy_NM, term in zip(dy, terms, strict=True):
        if dy_NM is not None:
            dx_NK.addmm_(dy_NM, term.weight_MK(dy_NM.dtype))
    return dx_NK


def _down_gradients(x_NK: Tensor, terms: Sequence[Term], u_NS: Tensor) -> list[Tensor]:
    """`u_i^T drop_i(x)` for each layer [R, K], in the dtype of its A."""
    if not _masked(terms):
        parts = torch.split(u_NS.T @ x_NK, [term.down.shape[0] for term in terms])
        return [part_RK.to(term.down.dtype) for term, part_RK in zip(terms, parts, strict=True)]
    return [
        (u_NR.T @ term.dropped(x_NK)).to(term.down.dtype).div_(term.kept)
        for term, u_NR in zip(terms, _by_rank(u_NS, terms), strict=True)
    ]

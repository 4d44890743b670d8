"""AdamW on bfloat16 weights that loses no update, however far below their resolution it is.

bfloat16 holds 8 significant bits: rounding to nearest drops every update below 1/512 of the weight. Two remedies
(Zamirai et al. 2020, arXiv:2010.06192):

    stochastic  round up as often as the part that rounding down would lose: the weight is exact in expectation
    kahan       keep what rounding lost and add it to the next sum; 16 bits hold all that float32 has more than
                bfloat16, so the sum is that of float32 weights to the bit

Bytes per trained weight, as weight + gradient + two moments in float32 (+ what rounding lost):

    float32     4 + 4 + 8      16, and 2 more for the bfloat16 copy that a forward and backward pass computes with
    kahan       2 + 2 + 8 + 2  14
    stochastic  2 + 2 + 8      12

Moments stay float32: in bfloat16 the second one never falls, because its decay of 0.1 % a step rounds away. Gradients
are bfloat16, so those of many micro-batches add up with its rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

Rounding = Literal["stochastic", "kahan"]
BUCKET = 2**20
"""Elements updated at a time: what bounds the float32 copies of weights and gradients."""
HALF, HIGH = 0x8000, -0x10000
"""Half a unit of bfloat16's last place, and the mask of its bits, in the bits of a float32."""


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) for bfloat16 parameters; float32 ones are updated as ever.

    Random bits come from torch's own generator of the parameters' device, whose state a checkpoint holds.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        rounding: Rounding,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.rounding = rounding

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # there is no closure to evaluate again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            settings = _Settings(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
            for bucket in _buckets(piece for p in group["params"] if p.grad is not None for piece in self._pieces(p)):
                _update(bucket, settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved state in its own dtypes: torch alone would round all of it to the parameters'."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _pieces(self, parameter: Tensor) -> Iterator[_Piece]:
        """A parameter with its state, cut along the first axis into pieces of about `BUCKET` elements."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros(parameter.shape, device=parameter.device)
            state["square"] = torch.zeros(parameter.shape, device=parameter.device)
            if self.rounding == "kahan" and parameter.dtype == torch.bfloat16:
                state["lost"] = torch.zeros_like(parameter, dtype=torch.int16)
        state["step"] += 1
        tensors = [parameter.detach(), parameter.grad, state["mean"], state["square"]]
        tensors += [state["lost"]] if "lost" in state else []
        tensors = [torch.atleast_1d(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
        rows = max(1, BUCKET * len(tensors[0]) // max(1, parameter.numel()))
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield _Piece(state["step"], *parts)


class _Settings(NamedTuple):
    """Hyperparameters of a parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Views of some rows of a parameter and its state; `step` counts from 1, `lost` is what kahan keeps."""

    step: int
    weight: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    lost: Tensor | None = None


def _buckets(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces together, up to `BUCKET` elements or one piece."""
    bucket: list[_Piece] = []
    size = 0
    for piece in pieces:
        if bucket and size + piece.weight.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += piece.weight.numel()
    if bucket:
        yield bucket


def _update(bucket: Sequence[_Piece], settings: _Settings) -> None:
    """One AdamW step by torch's own function, on float32 copies of bfloat16 weights and gradients."""
    device = bucket[0].weight.device
    weights = [_wide(piece).contiguous() for piece in bucket]
    adamw(
        weights,
        [piece.gradient.float().contiguous() for piece in bucket],
        [piece.mean for piece in bucket],
        [piece.square for piece in bucket],
        [],
        list(torch.tensor([piece.step - 1.0 for piece in bucket], device=device)),  # it counts them up
        fused=device.type in ("cpu", "cuda"),
        amsgrad=False,
        maximize=False,
        **settings._asdict(),
    )
    for piece, weight in zip(bucket, weights, strict=True):
        if piece.lost is not None:
            high, lost = split(weight)
            piece.weight.copy_(high)
            piece.lost.copy_(lost)
        elif piece.weight.dtype == torch.bfloat16:
            piece.weight.copy_(round_stochastically(weight))
        else:
            piece.weight.copy_(weight)  # onto itself, unless it lay scattered in memory


def _wide(piece: _Piece) -> Tensor:
    """A piece's weights in float32, with what rounding lost of them; the weights themselves where these are float32."""
    return piece.weight.float() if piece.lost is None else join(piece.weight, piece.lost)


def round_stochastically(values: Tensor) -> Tensor:
    """Float32 `values` as bfloat16, up or down by chance so that the expectation is the value; exact ones stay.

    Adds uniform 16-bit noise to the bits below bfloat16's last place and cuts them off; sixteen random bits a value
    are as fine as float32 is.
    """
    noise = _random_halves(values)
    bits = values.contiguous().view(torch.int32)
    return noise.add_(bits).add_(HALF).bitwise_and_(HIGH).view(torch.float32).bfloat16()


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 `values` as the nearest bfloat16 and what that lost, in int16 units of float32's last place."""
    bits = values.contiguous().view(torch.int32)
    high = (bits + HALF).bitwise_and_(HIGH)
    return high.view(torch.float32).bfloat16(), bits.sub(high).to(torch.int16)


def join(high: Tensor, lost: Tensor) -> Tensor:
    """The float32 values that `split` was given, to the bit."""
    return high.float().contiguous().view(torch.int32).add_(lost.to(torch.int32)).view(torch.float32)


def _random_halves(like: Tensor) -> Tensor:
    """Uniform int32 values from -32,768 to 32,767 in the shape of `like`, cut four at a time out of random int64."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(torch.iinfo(torch.int64).min, None)  # random_() alone leaves the sign bit unset
    return words.view(torch.int16)[: like.numel()].to(torch.int32).view(like.shape)

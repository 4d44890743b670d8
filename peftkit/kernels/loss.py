"""Output layer and cross-entropy in one, a chunk of logits at a time, and the models whose heads it describes.

Shapes: N labelled positions, C of them in a chunk, H hidden, R an adapter's rank, V vocabulary.

Logits are made, turned into the loss and into the loss's gradient, and overwritten by the next chunk's, so that nothing
of N x V elements exists and no product is computed twice (as in Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from peftkit.kernels.autograd import apply
from peftkit.kernels.layouts import DECODERS, model_type

CHUNK_BYTES: Final = {"cpu": 2**26}
"""Float32 logits of a chunk by device; twice as much gains a processor nothing, half costs it a tenth."""
CHUNK_BYTES_ELSEWHERE: Final = 2**28
"""An accelerator multiplies so fast that a chunk needs hundreds of positions to pay for reading the weight."""

HEADS: Final = DECODERS | {"cohere", "cohere2"}
SOFTCAPS: Final = {"gemma2": "final_logit_softcapping", "gemma3_text": "final_logit_softcapping"}
DIVISORS: Final = {"granite": "logits_scaling"}
FACTORS: Final = {"cohere": "logit_scale", "cohere2": "logit_scale"}
ELSEWHERE: Final = {"attn_logit_softcapping"}
"""Settings with `logit` in their names that concern attention."""


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: Sequence[tuple[Tensor, Tensor]] = (),
    smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The summed cross-entropy of `softcap * tanh(scale * (h W^T + b) / softcap)`, in float32.

    Products are in the dtype of their left factor, everything after them in float32 (float64 for float64). Gradients
    are those of the forward, which computes them too: the backward scales them, and can't be differentiated again.

    Args:
        target_N: token ids, all of them valid.
        low_rank: pairs (l: [N, R], U: [V, R]), each of which adds l U^T to h W^T.
        smoothing: the weight of the uniform distribution in the target, as torch's `label_smoothing`.
        chunk_bytes: of float32 logits that are held at a time; None takes what suits the device.
    """
    rows = _chunk_rows(target_N, len(weight_VH), chunk_bytes)
    form = _Form(smoothing, softcap, scale, rows, torch.is_grad_enabled())
    factors = [factor for pair in [(hidden_NH, weight_VH), *low_rank] for factor in pair]
    loss: Tensor = apply(_LinearCrossEntropy, form, target_N, bias_V, *factors)
    return loss


@dataclass(frozen=True, slots=True)
class LowRank:
    """An adapter beside the output layer: scaling * U A dropout(h), with A: [R, H] and U: [V, R]."""

    dropout: nn.Module
    down: nn.Linear
    up: nn.Linear
    scaling: float


@dataclass(frozen=True, slots=True)
class HeadRule:
    """How a model makes logits of its last hidden states.

    Attributes:
        output: the module that the model calls.
        linear: the weight and bias in it.
        low_rank: what adds to their product.
    """

    output: nn.Module
    linear: nn.Linear
    low_rank: tuple[LowRank, ...] = ()
    softcap: float | None = None
    scale: float = 1.0

    def loss(self, hidden_NH: Tensor, target_N: Tensor, *, smoothing: float = 0.0) -> Tensor:
        """The summed cross-entropy, in float32, differentiable."""
        (first, weight_VH), *rest = self._factors(hidden_NH)
        return linear_cross_entropy(
            first,
            weight_VH,
            target_N,
            bias_V=self.linear.bias,
            low_rank=rest,
            smoothing=smoothing,
            softcap=self.softcap,
            scale=self.scale,
        )

    @torch.no_grad()
    def scores(self, hidden_NH: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at each position [N], and whether the target is its likeliest token [N]; without gradients."""
        factors = self._factors(hidden_NH)
        rows = _chunk_rows(target_N, len(self.linear.weight))
        form = _Form(0.0, self.softcap, self.scale, rows, False)
        loss_N = target_N.new_empty(target_N.shape, dtype=torch.float32)
        correct_N = target_N.new_empty(target_N.shape, dtype=torch.bool)
        for chunk, logits_CV in _logits(form, self.linear.bias, *zip(*factors, strict=True)):
            _bend(logits_CV, form)
            loss_N[chunk] = functional.cross_entropy(logits_CV, target_N[chunk], reduction="none")
            correct_N[chunk] = logits_CV.argmax(-1) == target_N[chunk]
        return loss_N, correct_N

    def _factors(self, hidden_NH: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What is multiplied, the left factors in the dtype that the model's own modules would compute in."""
        device = hidden_NH.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        factors = [(hidden_NH.to(autocast or self.linear.weight.dtype), self.linear.weight)]
        for part in self.low_rank:
            low_NR = part.down(part.dropout(hidden_NH.to(part.down.weight.dtype))) * part.scaling
            factors.append((low_NR, part.up.weight))
        return factors


def read_head(model: Any) -> HeadRule | None:
    """The rule of a model's head as it stands now; None when it is not one that is known, for `head_trouble`'s reason.

    Cheap enough to ask for each forward, which keeps it right when adapters are disabled or merged.
    """
    found = _resolve(model)
    return found if isinstance(found, HeadRule) else None


def head_trouble(model: Any) -> str | None:
    """Why the output layer and the loss can't be computed in one, in words.

    None when they can, and for a model without a vocabulary to choose from, where there is nothing to gain.
    """
    found = _resolve(model)
    return found if isinstance(found, str) else None


def _resolve(model: Any) -> HeadRule | str | None:
    output = model.get_output_embeddings()
    if output is None:
        return None
    kind, config = model_type(model), model.config.get_text_config()
    if kind not in HEADS:
        return f"the output layer of {kind} is not one that peftkit knows"
    if config is not model.config:
        return f"{model.config.model_type} has parts beside its text decoder, and a forward of its own"
    own = {table[kind] for table in (SOFTCAPS, DIVISORS, FACTORS) if kind in table}
    strange = sorted(key for key in vars(config) if "logit" in key and key not in own | ELSEWHERE)
    if strange:
        return f"its configuration has {strange[0]}, which {kind} does not have"
    found = _linear_of(output)
    if isinstance(found, str):
        return found
    softcap = getattr(config, SOFTCAPS[kind]) if kind in SOFTCAPS else None
    scale = 1.0 / getattr(config, DIVISORS[kind]) if kind in DIVISORS else 1.0
    scale *= getattr(config, FACTORS[kind]) if kind in FACTORS else 1.0
    return HeadRule(output, found[0], found[1], softcap, scale)


def _linear_of(output: Any) -> tuple[nn.Linear, tuple[LowRank, ...]] | str:
    """The linear layer inside an output layer and the adapters beside it, or why they can't be told."""
    from peft.tuners import lora
    from peft.utils import ModulesToSaveWrapper

    if type(output) is ModulesToSaveWrapper:
        copies, name = output.modules_to_save, next(iter(output.active_adapters), None)
        return _linear_of(copies[name] if name in copies and not output.disable_adapters else output.original_module)
    base = output.base_layer if type(output) is lora.Linear else output
    if type(base) is not nn.Linear:
        return f"its output layer is a {type(base).__name__}, not a plain linear layer"
    if base is output or output.merged or output.disable_adapters:
        return base, ()
    active = [name for name in output.active_adapters if name in output.lora_A]
    if any(name in output.lora_variant or output.lora_B[name].bias is not None for name in active):
        return "LoRA on its output layer is of a kind that adds more than a product of two matrices"
    return base, tuple(
        LowRank(output.lora_dropout[name], output.lora_A[name], output.lora_B[name], output.scaling[name])
        for name in active
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """What stands between the products and the loss; positions in a chunk; whether gradients can be asked for."""

    smoothing: float
    softcap: float | None
    scale: float
    rows: int
    differentiable: bool


class _LinearCrossEntropy(torch.autograd.Function):
    """`factors` alternate: hidden states and the weight, then each adapter's two."""

    @staticmethod
    def forward(ctx: Any, form: _Form, target_N: Tensor, bias_V: Tensor | None, *factors: Tensor) -> Tensor:
        inputs, weights = factors[::2], factors[1::2]
        bias_wanted, *wanted = [form.differentiable and want for want in ctx.needs_input_grad[2:]]
        wide = _wide(inputs[0])
        narrow = [w.to(x.dtype) for x, w in zip(inputs, weights, strict=True)]
        d_inputs = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted[::2], strict=True)]
        d_weights = [
            w.new_zeros(w.shape, dtype=wide) if want else None for w, want in zip(weights, wanted[1::2], strict=True)
        ]
        d_bias = weights[0].new_zeros(len(weights[0]), dtype=wide) if bias_wanted else None
        loss = target_N.new_zeros((), dtype=wide)
        for chunk, logits_CV in _logits(form, bias_V, inputs, narrow):
            loss += _loss(logits_CV, target_N[chunk], form, differentiate=bias_wanted or any(wanted))
            for x, weight_VH, d_input, d_weight in zip(inputs, narrow, d_inputs, d_weights, strict=True):
                d_logits_CV = logits_CV.to(x.dtype)
                if d_input is not None:
                    torch.mm(d_logits_CV, weight_VH, out=d_input[chunk])
                if d_weight is not None:
                    _add_product(d_weight, d_logits_CV.T, x[chunk])
            if d_bias is not None:
                d_bias += logits_CV.sum(0)
        given = [bias_V, *weights]
        d_bias, *d_weights = [
            None if d is None or own is None else d.to(own.dtype)
            for d, own in zip([d_bias, *d_weights], given, strict=True)
        ]
        ctx.save_for_backward(d_bias, *[d for pair in zip(d_inputs, d_weights, strict=True) for d in pair])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else saved * gradient for saved in ctx.saved_tensors)
        return None, None, *scaled


def _logits(
    form: _Form, bias_V: Tensor | None, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk of positions and the sum of its products [C, V], in one buffer that the caller may overwrite."""
    count = len(inputs[0])
    narrow = [weight.to(x.dtype) for x, weight in zip(inputs, weights, strict=True)]
    buffer = inputs[0].new_empty((min(form.rows, count), len(weights[0])), dtype=_wide(inputs[0]))
    for start in range(0, count, form.rows):
        chunk = slice(start, min(start + form.rows, count))
        logits_CV = buffer[: chunk.stop - chunk.start]
        for index, (x, weight) in enumerate(zip(inputs, narrow, strict=True)):
            _add_product(logits_CV, x[chunk], weight.T, keep=index > 0)
        if bias_V is not None:
            logits_CV += bias_V
        yield chunk, logits_CV


def _bend(logits_CV: Tensor, form: _Form) -> None:
    """Scale and soft-cap the products, in place."""
    if form.scale != 1.0:
        logits_CV.mul_(form.scale)
    if form.softcap is not None:
        logits_CV.div_(form.softcap).tanh_().mul_(form.softcap)


def _loss(logits_CV: Tensor, target_C: Tensor, form: _Form, *, differentiate: bool) -> Tensor:
    """The summed loss of a chunk; the products become their gradient, in place, if that is asked for."""
    _bend(logits_CV, form)
    slope_CV = None
    if differentiate and form.softcap is not None:
        slope_CV = (logits_CV / form.softcap).square_().neg_().add_(1)
    index_C1 = target_C[:, None]
    hit = 1 - form.smoothing
    expected_C1 = logits_CV.gather(1, index_C1) * hit
    if form.smoothing:
        expected_C1 += logits_CV.mean(1, keepdim=True) * form.smoothing
    top_C1 = logits_CV.amax(1, keepdim=True)
    total_C1 = logits_CV.sub_(top_C1).exp_().sum(1, keepdim=True)
    loss = (total_C1.log() + top_C1 - expected_C1).sum()
    if differentiate:
        logits_CV.div_(total_C1)
        if form.smoothing:
            logits_CV.sub_(form.smoothing / logits_CV.shape[1])
        logits_CV.scatter_add_(1, index_C1, torch.full_like(expected_C1, -hit))
        if slope_CV is not None:
            logits_CV.mul_(slope_CV)
        if form.scale != 1.0:
            logits_CV.mul_(form.scale)
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, keep: bool = True) -> None:
    """Add a product to the total, or overwrite that unless `keep`; multiplied in the factors' dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=float(keep))
    elif keep:
        total += left @ right
    else:
        total.copy_(left @ right)


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are held in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunk_rows(target_N: Tensor, vocabulary: int, chunk_bytes: int | None = None) -> int:
    """Positions of a chunk, so that all chunks are about as long."""
    budget = chunk_bytes or CHUNK_BYTES.get(target_N.device.type, CHUNK_BYTES_ELSEWHERE)
    chunks = math.ceil(len(target_N) / max(1, budget // (4 * vocabulary)))
    return max(1, math.ceil(len(target_N) / max(1, chunks)))

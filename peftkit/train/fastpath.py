"""Which fast paths a run takes, and what it says about those it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from peftkit.data.batching import Batch, collate, micro_batches, pack, packs
from peftkit.data.features import Features
from peftkit.errors import MethodError
from peftkit.kernels.attention import packed_attention
from peftkit.kernels.install import install_kernels
from peftkit.kernels.loss import head_trouble
from peftkit.kernels.packed import packing_trouble
from peftkit.kernels.spec import Kernels
from peftkit.recipe import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FastPath:
    """How batches are laid out and which kernels compute them. The default is the plain path.

    Attributes:
        packed: examples of a forward lie end to end.
        products: packed attention by batched matrix products.
        fused_loss: output layer and loss in one.
    """

    packed: bool = False
    products: bool = False
    fused_loss: bool = False
    pad_id: int = 0
    model: Any = field(default=None, repr=False)

    @classmethod
    def open(cls, model: Any, kernels: Kernels, *, attention: str, pad_id: int, say: Say) -> FastPath:
        """Put the recipe's kernels on a model, and say which of them it cannot take.

        Args:
            attention: `backbone.attention` of the recipe.
        """
        packing = packing_trouble(model, attention=attention) if kernels.packing else None
        head = head_trouble(model) if kernels.loss else None
        for name, trouble in (("packing", packing), ("loss", head)):
            if trouble is not None:
                say(f"training.kernels.{name} is off: {trouble}")
        if kernels.attention and not kernels.packing:
            say("training.kernels.attention is off: its batches are packed, and training.kernels.packing is false")
        for done in install_kernels(model, kernels):
            say(done)
        return cls(
            packed=kernels.packing and packing is None,
            products=kernels.attention,
            fused_loss=kernels.loss and head is None,
            pad_id=pad_id,
            model=model,
        )

    def check_recomputing(self, recipe: Recipe) -> None:
        """Refuse recomputation where it would not see what the method trains.

        Raises:
            MethodError: with the remedy.
        """
        checkpointing = recipe.training.checkpointing
        if checkpointing not in ("auto", "off") and not self.packed and not recipe.method.checkpointable:
            raise MethodError(
                f"training.checkpointing={checkpointing} with method {recipe.method.kind!r} needs packed batches, "
                "which this backbone cannot take. Set training.checkpointing=off."
            )

    def active(self) -> AbstractContextManager[None]:
        """Around every forward and backward."""
        return packed_attention(self.model, products=self.products) if self.packed else nullcontext()

    def batches(
        self, examples: Sequence[Features], *, max_examples: int | None = None, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """The forwards of one optimizer step, or of one window of a split that is scored."""
        if self.packed:
            yield from map(pack, packs(examples, max_examples=max_examples, max_tokens=max_tokens))
        else:
            for group in micro_batches(examples, max_examples=max_examples, max_tokens=max_tokens):
                yield collate(group, self.pad_id)

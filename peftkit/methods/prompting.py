"""The baselines that train nothing: ask the backbone as it is, with or without examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from peftkit.backbones.dims import Dims
from peftkit.methods.base import Adapted, Method

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class ZeroShot(Method):
    """The backbone, asked."""

    kind: Literal["zero-shot"] = "zero-shot"
    shots = 0

    def trainable_params(self, dims: Dims) -> int:
        return 0

    def attach(self, backbone: Backbone) -> Adapted:
        return freeze(backbone)


class FewShot(Method):
    """The backbone, asked after `examples` demonstrations drawn from the training split."""

    kind: Literal["few-shot"] = "few-shot"
    examples: PositiveInt = 4

    @property
    def shots(self) -> int:  # type: ignore[override]  # a field of this method, a constant of every other
        return self.examples

    def trainable_params(self, dims: Dims) -> int:
        return 0

    def attach(self, backbone: Backbone) -> Adapted:
        return freeze(backbone)


def freeze(backbone: Backbone) -> Adapted:
    """The backbone as it came."""
    backbone.model.requires_grad_(False)
    return Adapted(backbone.model, "none")

"""LoRA and its close kin (rsLoRA, DoRA, PiSSA, OLoRA); on an NF4 backbone it is QLoRA.

`W x` becomes `W x + (alpha / rank) B A x` with `A: rank x in` and `B: out x rank` (Hu et al. 2021, arXiv:2106.09685).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from peftkit.backbones.dims import Dims, Linear, select_layers
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.methods.base import Adapted, Method, TaskKind, attach_peft

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone

LayerChoice = Annotated[str, Field(pattern=r"^(all|top-[1-9]\d*)$")] | list[NonNegativeInt]


class Lora(Method):
    """Low-rank updates beside frozen linear layers."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    alpha: PositiveFloat = Field(
        32, description="The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)"
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names or regexes of whole paths"
    )
    layers: LayerChoice = Field("all", description="all, top-N, or a list of block indices")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)")
    dora: bool = Field(
        False, description="Learn the magnitude apart from the direction (Liu et al. 2024, arXiv:2402.09353)"
    )
    init: Literal["default", "gaussian", "pissa", "olora"] = "default"
    modules_to_save: list[str] = Field([], description="Modules that train in full and are saved with the adapter")

    def trainable_params(self, dims: Dims) -> int:
        matched = self.matched(dims)
        per_layer = sum(self.rank * (linear.in_features + linear.out_features) for linear in matched)
        magnitudes = sum(linear.out_features for linear in matched) if self.dora else 0
        return per_layer + magnitudes + dims.saved_params([*dims.head_modules, *self.modules_to_save])

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        self.matched(dims)
        missing = [name for name in self.modules_to_save if not dims.saved_params([name])]
        if missing:
            raise MethodError(
                f"method.modules_to_save names {missing}, which the backbone does not have: {_names(dims)}"
            )
        if quantization != "none" and self.init in ("pissa", "olora"):
            raise MethodError(
                f"method.init={self.init} rewrites the frozen weights, which {quantization} cannot hold exactly. "
                "Set method.init=default, or backbone.quantization=none."
            )

    def attach(self, backbone: Backbone) -> Adapted:
        from peft import LoraConfig, TaskType

        dims = backbone.dims
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS if dims.head_modules else TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
            modules_to_save=[*dims.head_modules, *self.modules_to_save] or None,
            **self._target_arguments(dims),
        )
        return attach_peft(backbone, config)

    def label(self, quantization: Quantization) -> str:
        family = "dora" if self.dora else "lora"
        return {"none": family, "nf4": f"q{family}"}.get(quantization, f"{family}-{quantization}")

    def matched(self, dims: Dims) -> list[Linear]:
        """The linear layers that `targets` and `layers` select.

        Raises:
            MethodError: a pattern matches nothing, or a layer does not exist.
        """
        try:
            chosen = set(select_layers(dims, self.layers))
        except ValueError as fault:
            raise MethodError(f"method.{fault}") from fault
        within = [linear for linear in dims.linears if self.layers == "all" or linear.layer in chosen]
        if self.targets == "all-linear":
            return within
        for pattern in self.targets:
            if not any(_matches(pattern, linear) for linear in within):
                raise MethodError(
                    f"method.targets: {pattern!r} matches no linear layer of this backbone. {_names(dims)}"
                )
        return [linear for linear in within if any(_matches(pattern, linear) for pattern in self.targets)]

    def _target_arguments(self, dims: Dims) -> dict[str, Any]:
        """The matched layers in PEFT's words: leaf names where these say it exactly, whole paths otherwise."""
        matched = self.matched(dims)
        leaves = sorted({linear.leaf for linear in matched})
        layers = sorted({linear.layer for linear in matched if linear.layer is not None})
        restricted = self.layers != "all"
        reached = [x for x in dims.linears if x.leaf in leaves and (not restricted or x.layer in layers)]
        if reached == matched:
            return {"target_modules": leaves, "layers_to_transform": layers if restricted else None}
        return {"target_modules": [linear.path for linear in matched]}


def _matches(pattern: str, linear: Linear) -> bool:
    if linear.path == pattern or linear.path.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, linear.path) is not None
    except re.error as fault:
        raise MethodError(
            f"method.targets: {pattern!r} is neither a module name nor a regular expression: {fault}"
        ) from fault


def _names(dims: Dims) -> str:
    return "Available: " + ", ".join(sorted({linear.leaf for linear in dims.linears})) + "."

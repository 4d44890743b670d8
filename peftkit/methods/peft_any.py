"""Every other method of the installed `peft` library, by its name and its own configuration fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError, nearest
from peftkit.methods.base import Adapted, Method, TaskKind, attach_peft

if TYPE_CHECKING:
    from peftkit.backbones.load import Backbone


class PeftAny(Method):
    """`{kind: peft, type: IA3, ...}`: the remaining keys are the fields of that PEFT configuration class."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["peft"] = "peft"
    type: str = Field(description="A PEFT type such as IA3, VERA, P_TUNING, OFT, MISS")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are handed to the PEFT configuration."""
        return dict(self.model_extra or {})

    def trainable_params(self, dims: Dims) -> int:
        """Counted by attaching to a model without storage: these methods have no formula in common."""
        from peftkit.backbones.load import build_skeleton

        return sum(
            p.numel() for p in self._wrap(build_skeleton(dims.config, dims.head), dims).parameters() if p.requires_grad
        )

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        from peftkit.backbones.load import build_skeleton

        self._wrap(build_skeleton(dims.config, dims.head), dims)

    def attach(self, backbone: Backbone) -> Adapted:
        return attach_peft(backbone, self._config(backbone.dims))

    def label(self, quantization: Quantization) -> str:
        name = self.type.lower().replace("_", "-")
        return name if quantization == "none" else f"{name}-{quantization}"

    def _config(self, dims: Dims) -> Any:
        from dataclasses import fields

        from peft import TaskType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        types = {key.value: config for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        config_class = types.get(self.type.upper())
        if config_class is None:
            raise MethodError(
                f"method.type: the installed peft has no {self.type!r}{nearest(self.type.upper(), list(types))}. "
                f"It has: {', '.join(sorted(types))}."
            )
        known = sorted(field.name for field in fields(config_class) if field.init)
        for key in self.options:
            if key not in known:
                raise MethodError(f"method.{key}: {config_class.__name__} has no such field{nearest(key, known)}.")
        options = {"task_type": TaskType.SEQ_CLS if dims.head_modules else TaskType.CAUSAL_LM, **self.options}
        if dims.head_modules and "modules_to_save" in known:
            options["modules_to_save"] = [*dims.head_modules, *options.get("modules_to_save", [])]
        try:
            return config_class(**options)
        except (TypeError, ValueError) as fault:
            raise MethodError(f"method: {config_class.__name__} refuses these settings: {fault}") from fault

    def _wrap(self, model: Any, dims: Dims) -> Any:
        from peft import get_peft_model

        from peftkit.backbones.quiet import quietly

        config = self._config(dims)
        try:
            with quietly():
                return get_peft_model(model, config)
        except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError) as fault:
            raise MethodError(f"method {self.type} cannot be put on {dims.model_type}: {fault}") from fault

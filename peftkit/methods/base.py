"""What every finetuning method is: a frozen spec that can count what it trains and attach itself to a backbone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from peftkit.backbones.dims import Dims
from peftkit.backbones.spec import Quantization
from peftkit.errors import MethodError
from peftkit.spec import Section

if TYPE_CHECKING:
    import torch

    from peftkit.backbones.load import Backbone

TaskKind = Literal["chat", "completion", "classify"]


@dataclass(frozen=True, slots=True)
class Adapted:
    """A backbone with a method attached: which tensors exist, and which of them train.

    Attributes:
        model: what the loop calls; a `PeftModel`, or the backbone's own model.
        artifact: what `save` writes: a PEFT adapter, a whole model, or nothing.
        autocast: dtype to compute in while the weights themselves are wider; None computes in the weights' own.
        rounding: how bfloat16 weights that train take updates finer than they hold; None where they train in float32.
    """

    model: torch.nn.Module
    artifact: Literal["adapter", "model", "none"]
    autocast: torch.dtype | None = None
    rounding: Literal["stochastic", "kahan"] | None = None

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the artifact into `folder` as `PeftModel` or `from_pretrained` read it."""
        from peftkit.backbones.quiet import quietly

        with quietly():
            self.model.save_pretrained(folder)  # type: ignore[operator]  # every transformers and peft model has it


class Method(Section):
    """The spec of one method. Subclasses are its only implementation; nothing else knows their names."""

    kind: str
    checkpointable: ClassVar[bool] = True
    """Whether layers of a padded forward can recompute their activations under this method; a packed one always can."""
    shots: ClassVar[int | None] = None
    """None for methods that train; the number of demonstrations for prompting baselines."""

    @abstractmethod
    def trainable_params(self, dims: Dims) -> int:
        """Parameters that train on a backbone of these dimensions, its new head included. Pure."""

    @abstractmethod
    def attach(self, backbone: Backbone) -> Adapted:
        """Put the method on a loaded backbone. Parameters that train are float32."""

    def check(self, dims: Dims, task: TaskKind, quantization: Quantization) -> None:
        """Refuse, before any weight is loaded, what cannot work.

        Raises:
            MethodError: with the reason and the remedy.
        """

    def label(self, quantization: Quantization) -> str:
        """The short name that tables print."""
        return self.kind if quantization == "none" else f"{self.kind}-{quantization}"


def require_trainable_weights(method: str, quantization: Quantization) -> None:
    """Refuse a method that trains the backbone's own weights on a quantized backbone.

    Raises:
        MethodError: always when quantized.
    """
    if quantization != "none":
        raise MethodError(
            f"method {method!r} trains the backbone's own weights, which cannot be done in {quantization}. "
            "Set backbone.quantization=none, or method=qlora to train LoRA on the quantized backbone."
        )


def attach_peft(backbone: Backbone, config: object) -> Adapted:
    """Wrap the backbone in a `PeftModel`; whatever trains is held in float32."""
    from peft import get_peft_model

    from peftkit.backbones.quiet import quietly

    with quietly():
        model = get_peft_model(backbone.model, config)
    raise_trainable_to_float32(model)
    return Adapted(model, "adapter")


def load_peft(backbone: Backbone, folder: Path) -> Adapted:
    """Put a saved PEFT adapter on the backbone, as `PeftModel` reads it; heads saved with it stay in float32."""
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    from peftkit.backbones.quiet import quietly

    with quietly():
        model = PeftModel.from_pretrained(backbone.model, str(folder), torch_device=str(backbone.model.device))
    heads = [parameter for name, parameter in model.named_parameters() if ".modules_to_save." in name]
    for parameter in heads:
        parameter.requires_grad_(True)
    raise_trainable_to_float32(model)
    with quietly():  # once more: the first time, the heads were rounded to the dtype of the backbone
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    model.requires_grad_(False)
    return Adapted(model.eval(), "adapter")


def has_values(model: torch.nn.Module) -> bool:
    """Whether a model is there to compute with, and not only planned with."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())


def raise_trainable_to_float32(model: torch.nn.Module) -> None:
    """Hold every trainable parameter in float32; modules around them take inputs of any float dtype."""
    import torch

    from peftkit.backbones.load import match_input_dtype

    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if not any(parameter.requires_grad for parameter in own):
            continue
        for parameter in own:
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(match_input_dtype)

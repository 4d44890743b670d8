"""One file per method. The set of methods is this union; adding one is a file and a line."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peftkit.methods.base import Adapted, Method
from peftkit.methods.full import Full
from peftkit.methods.head import HeadOnly
from peftkit.methods.lora import Lora
from peftkit.methods.peft_any import PeftAny
from peftkit.methods.prefix import Prefix
from peftkit.methods.prompt import Prompt
from peftkit.methods.prompting import FewShot, ZeroShot

AnyMethod = Annotated[
    Full | Lora | Prefix | Prompt | HeadOnly | ZeroShot | FewShot | PeftAny, Field(discriminator="kind")
]
ALIASES: dict[str, dict[str, dict[str, str]]] = {
    "qlora": {"method": {"kind": "lora"}, "backbone": {"quantization": "nf4"}},
}
"""Names that stand for two axes at once."""

__all__ = ["ALIASES", "Adapted", "AnyMethod", "Method"]

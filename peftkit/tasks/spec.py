"""The `task` section of a recipe: typed settings of each task, without torch. The set of tasks is this union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from peftkit.spec import Section


class Chat(Section):
    """Supervised finetuning on conversations; the assistant's tokens carry the loss."""

    kind: Literal["chat"] = "chat"
    train_on: Literal["assistant", "last-assistant", "everything"] = Field(
        "assistant", description="Which turns carry loss"
    )
    system: str | None = Field(None, description="System message for conversations that have none")
    template: str | None = Field(None, description="Path of a Jinja chat template, for tokenizers without one")


class Completion(Section):
    """Prompt and completion, the completion carries the loss; or plain text, all of which does."""

    kind: Literal["completion"] = "completion"
    separator: str = Field("", description="Text between prompt and completion")


class Classify(Section):
    """Sequence classification or regression, of texts or pairs of texts."""

    kind: Literal["classify"] = "classify"
    problem: Literal["auto", "single-label", "multi-label", "regression"] = "auto"
    labels: list[str] | None = Field(
        None, description="The labels in order; default: those of the training split, sorted"
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="Multi-label: probability above which a label is given")
    prompt: str = Field(
        "{text}\nLabel:", description="How the prompting baselines ask; {text}, {text_pair} are filled in"
    )


AnyTask = Annotated[Chat | Completion | Classify, Field(discriminator="kind")]

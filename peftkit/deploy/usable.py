"""A model opened for use: a run, a merged model, an adapter on its base or a plain backbone, and how it is asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftkit.backbones.load import Backbone, load_backbone, read_config
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head, Problem
from peftkit.data.chat import ExampleFault, Message, render_prompt
from peftkit.deploy.adapter import Source, attach, check_base, locate, read_source
from peftkit.errors import InputError
from peftkit.folder import HEAD_NAME, RECIPE_NAME
from peftkit.methods.base import Adapted, TaskKind
from peftkit.recipe import Recipe
from peftkit.run import open_run, read_saved_head
from peftkit.tasks import open_task
from peftkit.tasks.base import Task
from peftkit.tasks.spec import Classify

PROBLEMS: dict[str | None, Problem] = {
    "regression": "regression",
    "multi_label_classification": "multi_label_classification",
}


@dataclass(frozen=True, slots=True)
class Usable:
    """A loaded model and how it is asked.

    Attributes:
        adapted: what answers, in evaluation mode.
        backbone: what it stands on; its model has the adapter in it, unless that only adds virtual tokens.
        tokenizer: the artifact's own where it has one: a run may bring its chat template.
        kind: chat and completion write text, classify labels it.
        task: the runtime of a classifier; None otherwise.
        system: what the run was trained to see before conversations without a system message.
        separator: what the run was trained to see behind a prompt.
    """

    adapted: Adapted
    backbone: Backbone
    tokenizer: Any
    kind: TaskKind
    task: Task | None = None
    system: str | None = None
    separator: str = ""

    @property
    def model(self) -> Any:
        """A `PeftModel`, or the backbone's own model."""
        return self.adapted.model

    @property
    def virtual_tokens(self) -> int:
        """Trained tokens that prompt and prefix tuning put before every input; 0 elsewhere."""
        configs = getattr(self.model, "peft_config", None) or {}
        return max((getattr(config, "num_virtual_tokens", 0) or 0 for config in configs.values()), default=0)

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            InputError: the chat template refuses it, or there is none.
        """
        try:
            text = render_prompt(messages, self.tokenizer, self.system)
        except ExampleFault as fault:
            raise InputError(str(fault)) from fault
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, prompt: str) -> list[int]:
        """The tokens of a prompt that is no conversation, as the run was trained to see it."""
        return list(self.tokenizer(prompt + (self.separator if prompt else ""))["input_ids"])

    def asked(self, prompt: str) -> list[int]:
        """The tokens of one question: a conversation's first message where conversations are understood."""
        return self.conversation([{"role": "user", "content": prompt}]) if self.kind == "chat" else self.text(prompt)

    def stops(self) -> list[int]:
        """The tokens that end an answer: the model's and the tokenizer's, which finetuning teaches."""
        known = self.backbone.model.generation_config.eos_token_id
        several = known if isinstance(known, list) else [known]
        return sorted({token for token in (*several, self.tokenizer.eos_token_id) if token is not None})


def open_usable(reference: str | Path, *, device: str | torch.device = "cpu") -> Usable:
    """Load a run, a model folder, an adapter's folder, a packaged backbone or a hub id.

    Raises:
        InputError: there is nothing to use, or it cannot be loaded.
    """
    folder = Path(reference)
    if (folder / "adapter_config.json").is_file():
        run = locate(folder)[1]
        if run is None:
            source = read_source(folder, foldable=False)
            return seat(source, load_backbone(source.spec, source.head, device=device))
        folder = run
    if (folder / RECIPE_NAME).is_file():
        return _open_trained(folder, device)
    spec = BackboneSpec(name=str(reference))
    head = read_saved_head(folder) if (folder / HEAD_NAME).is_file() else _head_of(spec)
    backbone = load_backbone(spec, head, device=device)
    return _usable(Adapted(backbone.model.eval(), "none"), backbone, backbone.tokenizer, None, head)


def seat(source: Source, backbone: Backbone) -> Usable:
    """An adapter on its base, whose model is changed in place.

    Raises:
        BackboneError: it was trained on another base.
    """
    check_base(source, backbone)
    tokenizer = _own_tokenizer(source.adapter, backbone)
    return _usable(Adapted(attach(source, backbone), "adapter"), backbone, tokenizer, source.recipe, source.head)


def refuse_classifier(usable: Usable, reference: str | Path) -> None:
    """Stop where text is asked of what labels it.

    Raises:
        InputError: it classifies.
    """
    if usable.kind == "classify":
        raise InputError(
            f"{reference} classifies; it does not write text. Use `peftkit eval {reference}`, or `peftkit serve`."
        )


def _open_trained(folder: Path, device: str | torch.device) -> Usable:
    opened = open_run(folder, device=device)
    if opened.recipe.task.kind == "classify" and opened.recipe.method.shots is not None:
        raise InputError(f"{folder} is a prompting baseline: nothing was trained, so there is nothing to use.")
    own = next((folder / kind for kind in ("adapter", "model") if (folder / kind).is_dir()), folder)
    tokenizer = _own_tokenizer(own, opened.backbone)
    return _usable(opened.adapted, opened.backbone, tokenizer, opened.recipe, opened.backbone.dims.head)


def _usable(adapted: Adapted, backbone: Backbone, tokenizer: Any, recipe: Recipe | None, head: Head) -> Usable:
    if head.kind == "classification":
        spec = recipe.task if recipe is not None and isinstance(recipe.task, Classify) else Classify()
        return Usable(adapted, backbone, tokenizer, "classify", task=open_task(spec, head))
    if recipe is None:
        return Usable(adapted, backbone, tokenizer, "completion" if tokenizer.chat_template is None else "chat")
    system, separator = getattr(recipe.task, "system", None), getattr(recipe.task, "separator", "")
    return Usable(adapted, backbone, tokenizer, recipe.task.kind, system=system, separator=separator)


def _own_tokenizer(folder: Path, backbone: Backbone) -> Any:
    """The tokenizer saved with an artifact; its base's where there is none."""
    from transformers import AutoTokenizer

    from peftkit.backbones.quiet import quietly

    if not (folder / "tokenizer_config.json").is_file():
        return backbone.tokenizer
    with quietly():
        return AutoTokenizer.from_pretrained(str(folder))


def _head_of(spec: BackboneSpec) -> Head:
    """What a model's own configuration says about its head."""
    config = read_config(spec)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return LANGUAGE_HEAD
    problem = "regression" if config.num_labels == 1 else PROBLEMS.get(config.problem_type)
    labels = () if problem == "regression" else tuple(config.id2label[index] for index in range(config.num_labels))
    return Head("classification", labels, problem or "single_label_classification")


def tensors_of(model: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def open_together(
    reference: str | Path, adapters: Mapping[str, Path], *, name: str, device: str | torch.device = "cpu"
) -> dict[str, Usable]:
    """Several adapters on one base, each a model of its own by its name, over the same weights in memory.

    Args:
        reference: the base, which then answers as `name`; or an adapter on it, which does.

    Raises:
        InputError: adapters of different bases, classifiers, or one that changes the base it is put on.
    """
    sources, base = gather(reference, adapters, name)
    first = next(iter(sources.values()))
    spec = base or first.spec
    for called, source in sources.items():
        _check_company(called, source, spec)
    backbone = load_backbone(spec, LANGUAGE_HEAD, device=device)
    found = {}
    if base is not None:
        found[name] = _usable(Adapted(backbone.model.eval(), "none"), backbone, backbone.tokenizer, None, LANGUAGE_HEAD)
    before = _probe(backbone.model)
    for called, source in sources.items():
        found[called] = seat(source, _sharing(backbone))
        if not torch.equal(_probe(backbone.model), before):
            raise InputError(
                f"{called}: {source.adapter} changes its base when it is loaded, so it cannot share it with others. "
                "Merge it (peftkit merge), and serve the result alone."
            )
    return found


def gather(
    reference: str | Path, adapters: Mapping[str, Path], name: str
) -> tuple[dict[str, Source], BackboneSpec | None]:
    """The adapters by name, and the base where it is served itself; where `reference` is an adapter, it is not.

    Raises:
        InputError: an adapter that cannot be understood.
    """
    folder = Path(reference)
    others = {called: read_source(path, foldable=False) for called, path in adapters.items()}
    if any((folder / place).is_file() for place in ("adapter_config.json", "adapter/adapter_config.json")):
        return {name: read_source(folder, foldable=False), **others}, None
    whole = folder / "model" if (folder / RECIPE_NAME).is_file() and (folder / "model").is_dir() else reference
    spec = BackboneSpec(name=str(whole))
    for source in others.values():  # the base takes the numbers of the first adapter
        return others, spec.model_copy(update={key: getattr(source.spec, key) for key in ("dtype", "quantization")})
    return others, spec


def _check_company(called: str, source: Source, spec: BackboneSpec) -> None:
    if source.head.kind != "language":
        raise InputError(f"{called}: {source.adapter} is a classifier. Classifiers are served one at a time.")
    if (source.spec.quantization, source.spec.dtype) != (spec.quantization, spec.dtype):
        theirs, ours = (f"{known.dtype}, quantization {known.quantization}" for known in (source.spec, spec))
        raise InputError(
            f"{called}: {source.adapter} was trained over other numbers than its company ({theirs}; {ours}). "
            "Serve it on its own."
        )
    if getattr(source.config, "bias", "none") != "none":
        raise InputError(
            f"{called}: {source.adapter} trained the base's biases, so it cannot share it with others. Merge it."
        )


def _sharing(backbone: Backbone) -> Backbone:
    """The same with modules of its own over the same tensors: an adapter changes the modules, not the tensors."""
    from copy import deepcopy
    from dataclasses import replace

    same = {id(tensor): tensor for tensor in tensors_of(backbone.model)}
    return replace(backbone, model=deepcopy(backbone.model, same))


@torch.inference_mode()
def _probe(model: Any) -> torch.Tensor:
    """Logits of a few tokens, which tell whether any weight has changed."""
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits: torch.Tensor = model(input_ids=tokens).logits
    return logits

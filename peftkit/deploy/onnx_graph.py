"""A model as an ONNX graph, written by transformers' own exporter, and asked the same in ONNX Runtime.

Encoders and classifiers are one graph from tokens to hidden states or logits. A causal model is one graph too, with
its key-value cache as inputs and outputs: an empty cache reads the prompt, a full one goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftkit.backbones.quiet import quietly
from peftkit.deploy.llama_cpp import INSTALL
from peftkit.deploy.parity import ANSWER_TOKENS, PROMPTS, Parity
from peftkit.errors import BackboneError, InputError

NEEDED = ("onnx", "onnxscript", "onnxruntime")
DECODER, GRAPH = "decode", "model"
TOLERANCE = 1e-3
"""Largest difference of an output in float32, in units of the largest output; sums in another order stay below 1e-4."""


def require_exporter() -> None:
    """Refuse to begin without the packages.

    Raises:
        InputError: one is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}. Install: {INSTALL}")


def load_model(folder: Path, config: Any, name: str) -> Any:
    """The model in float32 under the head that its files have.

    Raises:
        BackboneError: neither an encoder, a classifier nor a causal model.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    written = (config.architectures or [""])[0]
    kinds = {
        "ForSequenceClassification": AutoModelForSequenceClassification,
        "ForCausalLM": AutoModelForCausalLM,
        "Model": AutoModel,
    }
    kind = next((kinds[end] for end in kinds if written.endswith(end)), None)
    if kind is None or config.is_encoder_decoder:
        raise BackboneError(
            f"{name} is {written or 'of no named architecture'}; encoders, sequence classifiers and causal models are "
            "exported. Use transformers.exporters on it yourself."
        )
    with quietly():
        return kind.from_pretrained(str(folder), dtype=torch.float32).eval()


def write_graph(model: Any, tokenizer: Any, folder: Path, *, causal: bool) -> None:
    """Write `model.onnx` (`decode.onnx` for a causal model), its weights beside it, configuration and tokenizer."""
    from transformers.exporters.base import ExportedModel
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    settings = OnnxConfig(dynamic=True)
    sample = dict(tokenizer([PROMPTS[0]] * 2 if causal else list(PROMPTS[:2]), return_tensors="pt", padding=True))
    with _silently(), torch.no_grad():
        exporter = OnnxExporter()
        if causal:
            sample.pop("token_type_ids", None)
            model.config.use_cache = True
            parts = decompose_for_generation(model, sample, multi_token_decode=True)
            part, inputs = parts[DECODER]
            component = exporter.export(part, inputs, settings).components[GRAPH]
            exported = ExportedModel(
                {DECODER: component},
                exporter.export_format,
                config=model.config,
                generation_config=model.generation_config,
            )
        else:
            exported = exporter.export(model, sample, settings)
        exported.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))


def check_graph(model: Any, tokenizer: Any, folder: Path, *, causal: bool) -> Parity:
    """Ask the files in ONNX Runtime and the model in torch the same prompts."""
    from importlib.metadata import version

    engine = f"ONNX Runtime {version('onnxruntime')}"
    with quietly(), torch.inference_mode():
        found = _check_answers(model, tokenizer, folder) if causal else _check_outputs(model, tokenizer, folder)
    return found.model_copy(update={"engine": engine, "prompts": len(PROMPTS), "tolerance": TOLERANCE})


def _check_outputs(model: Any, tokenizer: Any, folder: Path) -> Parity:
    """Each prompt alone, then all of them padded to one length."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / f"{GRAPH}.onnx"), providers=["CPUExecutionProvider"])
    names, output = [each.name for each in session.get_inputs()], session.get_outputs()[0].name
    largest, agreed, positions = 0.0, 0, 0
    for texts in (*([prompt] for prompt in PROMPTS), list(PROMPTS)):
        inputs = _padded(tokenizer, texts)
        ours = model(**inputs)[0].float()
        theirs = torch.from_numpy(session.run([output], _feed(inputs, names))[0])
        real = inputs["attention_mask"].bool() if ours.dim() == 3 else torch.ones(len(texts), dtype=torch.bool)
        largest = max(largest, float((ours - theirs)[real].abs().max() / ours[real].abs().max()))
        agreed += int((ours.argmax(-1) == theirs.argmax(-1))[real].sum())
        positions += int(real.sum())
    failures = [f"an output differs by {largest:.3g} of the largest"] if largest > TOLERANCE else []
    if agreed < positions:
        failures.append(f"{positions - agreed} of {positions} outputs have another largest entry")
    return Parity(
        status="failed" if failures else "ok",
        positions=positions,
        top1_agreement=agreed / positions,
        max_abs_difference=largest,
        failures=tuple(failures),
    )


def _check_answers(model: Any, tokenizer: Any, folder: Path) -> Parity:
    """Greedy answers: the prompt over an empty cache, then token by token over the cache that comes back."""
    from transformers.cache_utils import DynamicCache
    from transformers.exporters.base import ExportedModel

    runner = ExportedModel.from_pretrained(str(folder), device="cpu").runners[DECODER]
    width = model.config.to_dict().get("head_dim") or model.config.hidden_size // model.config.num_attention_heads
    empty = torch.zeros(1, model.config.num_key_value_heads, 0, width)
    largest, agreed, positions, identical = 0.0, 0, 0, 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        answer: list[int] = []
        logits, cache, step = [], DynamicCache([(empty, empty)] * model.config.num_hidden_layers, model.config), ids
        for _ in range(ANSWER_TOKENS):
            length = ids.shape[1] + len(answer)
            found = runner(
                input_ids=step,
                attention_mask=torch.ones(1, length, dtype=torch.long),
                position_ids=torch.arange(length - step.shape[1], length)[None],
                past_key_values=cache,
            )
            cache = found.past_key_values
            logits.append(found.logits[0, -1].float())
            answer.append(int(logits[-1].argmax()))
            step = torch.tensor([[answer[-1]]])
        whole = torch.cat([ids, torch.tensor([answer[:-1]])], 1)
        ours = model(input_ids=whole).logits[0, ids.shape[1] - 1 :].float()
        theirs = torch.stack(logits)
        same = ours.argmax(-1) == theirs.argmax(-1)
        largest = max(largest, float((ours - theirs).abs().max() / ours.abs().max()))
        agreed, positions, identical = agreed + int(same.sum()), positions + len(same), identical + bool(same.all())
    failures = [f"a logit differs by {largest:.3g} of the largest"] if largest > TOLERANCE else []
    if identical < len(PROMPTS):
        failures.append(f"{len(PROMPTS) - identical} of {len(PROMPTS)} greedy answers differ")
    return Parity(
        status="failed" if failures else "ok",
        positions=positions,
        identical_answers=identical,
        top1_agreement=agreed / positions,
        max_abs_difference=largest,
        failures=tuple(failures),
    )


@contextmanager
def _silently() -> Iterator[None]:
    """Without the exporter's progress on standard output, and its warnings of operators that no model here has."""
    logging.disable(logging.WARNING)
    try:
        with quietly(), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _padded(tokenizer: Any, texts: Any) -> Mapping[str, Tensor]:
    encoded: Mapping[str, Tensor] = tokenizer(list(texts), return_tensors="pt", padding=True)
    return encoded


def _feed(inputs: Mapping[str, Tensor], names: list[str]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in inputs.items() if name in names}

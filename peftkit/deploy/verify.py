"""The proof: the model on disk answers like the adapter, or the model, that it was made from; or it is rejected.

**Like with like.** Both sides are computed in float32 arithmetic, each over its own weights: the adapter over the
frozen base in the numbers it was trained on (bfloat16 values, or NF4 codes through bitsandbytes' own kernels) with its
float32 parameters, the candidate over the numbers in its files. What is left is the fold and its one rounding.
Activations in bfloat16 would bury that: for SmolLM2-135M one and the same adapter computed in bfloat16 and in float32
differs five times more than the merge does. An int8 base is compared through its dequantized weights: its kernel rounds
activations too, which no fold can copy.

What rounding can explain is derived in `tolerance`. Where memory does not hold a model, both sides read their weights
layer by layer (`streamed`), the inputs are a few of one length, and nothing is written or scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from peftkit.deploy.answers import LOGIT_BYTES
from peftkit.deploy.changes import file_faults
from peftkit.deploy.in_memory import examine_in_memory
from peftkit.deploy.probes import fixed_inputs, make_probes
from peftkit.deploy.sides import Side, open_side
from peftkit.deploy.streamed import examine_streamed
from peftkit.deploy.texts import text_faults
from peftkit.deploy.verification import Proof, Question, Say, refuse
from peftkit.errors import BackboneError

if TYPE_CHECKING:
    from peftkit.backbones.dims import Dims
    from peftkit.backbones.spec import Head

BESIDE_BYTES = 2**30
"""Memory that a proof needs beside weights and logits."""


def examine(question: Question, say: Say = lambda text: None) -> Proof:
    """Answer a question in this process.

    Raises:
        InputError: the reference cannot be understood or loaded. A candidate that cannot be is a failure.
    """
    from peftkit.recipe import load_recipe

    side, folder = open_side(question.reference, question.base), Path(question.candidate)
    recipe = load_recipe(Path(question.on)) if question.on else side.recipe
    dims, tokenizer = side.dims(), side.tokenizer()
    probes = make_probes(recipe, side.head, tokenizer, dims, question.max_examples)
    say("checking the files and the tokenizer")
    faults = [*file_faults(folder, question.digests)] if (folder / "config.json").is_file() else []
    if faults:
        return refuse(probes, "unknown", faults, "nothing: it was not looked at")
    faults += _outer_faults(side, folder, tokenizer)
    streamed = question.streamed if question.streamed is not None else not has_room(side, dims)
    if streamed:
        return examine_streamed(side, folder, dims, fixed_inputs(probes), faults, question.onto, say)
    return examine_in_memory(side, folder, dims, probes, faults, question.onto, say)


def has_room(side: Side, dims: Dims) -> bool:
    """Whether the memory that is free holds one model in float32 at a time, and the logits of both sides."""
    copies = 1 if side.spec.quantization == "none" else 3  # what its codes stand for, and the other kind of weights
    needed = copies * 4 * dims.num_params + 3 * LOGIT_BYTES + BESIDE_BYTES
    return int(psutil.virtual_memory().available) >= needed


def _outer_faults(side: Side, folder: Path, tokenizer: Any) -> list[str]:
    """What is wrong beside the weights: tokenizer, chat template, labels."""
    from peftkit.backbones.load import load_tokenizer, read_config

    other = open_side(folder)
    try:
        theirs = other.tokenizer() if other.source else load_tokenizer(other.spec, folder)
        faults = text_faults(tokenizer, theirs)
    except BackboneError:
        faults = ["it has no tokenizer that can be read"]
    if other.head != side.head:
        faults.append(f"its head is {_told(other.head)}, and was {_told(side.head)}")
    elif side.head.labels and other.source is None:
        labels = tuple(name for _, name in sorted(read_config(other.spec).id2label.items()))
        if labels != side.head.labels:
            faults.append(f"its labels are {', '.join(labels[:4])}, and were {', '.join(side.head.labels[:4])}")
    return faults


def _told(head: Head) -> str:
    return head.kind + (f" ({', '.join(head.labels[:4])})" if head.labels else "")

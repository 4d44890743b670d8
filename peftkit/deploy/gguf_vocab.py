"""A tokenizer of transformers in the words of llama.cpp: tokens and types, merges or scores, flags, chat template.

Two kinds are known to both: byte-level BPE, whose splitting llama.cpp knows by name (`tokenizer.ggml.pre`), and the
BPE of SentencePiece, which merges by scores. A kind that the engine would split otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftkit.errors import BackboneError

SPACE = "\u2581"
"""What stands for a space in SentencePiece's vocabularies."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _GPT4O.replace(_ENDINGS, "").replace(r"\p{N}{1,3}", r"\p{N}")

SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    (("bytes",), False): "gpt-2",
    (("digits", "bytes"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
    ((_GPT4O,), False): "gpt-4o",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name of a splitting: what splits in turn, and whether a word of the vocabulary is taken unmerged.

`bytes` is the byte-level step with GPT-2's own expression, `digits` the step that parts digits; the others are
expressions followed by a plain byte-level step.
"""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is written.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece's).
        split: name of the splitting; `default` for SentencePiece's.
        tokens: one for each row of the embedding.
        types: GGUF's token types, as numbers.
        merges: of byte-level BPE, in their order.
        scores: of SentencePiece's BPE: the higher, the earlier merged.
        space_first: a space is put before the text.
    """

    model: str
    split: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    space_first: bool


def read_vocabulary(tokenizer: Any, rows: int, name: str) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to the rows of the embedding.

    Raises:
        BackboneError: a kind that llama.cpp does not know, or more tokens than rows.
    """
    import gguf

    content = _content(tokenizer, name)
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown(name, f"its tokenizer is a {model['type']} model")
    types = gguf.TokenType
    words = {index: word for word, index in model["vocab"].items()}
    kinds = dict.fromkeys(words, int(types.NORMAL))
    for token in content["added_tokens"]:
        special = token["special"] or token["id"] == tokenizer.eos_token_id
        words[token["id"]] = token["content"] if special else token["content"].replace(SPACE, " ")
        kinds[token["id"]] = int(types.CONTROL if special else types.USER_DEFINED)
    if max(words) >= rows:
        raise BackboneError(
            f"{name} has {max(words) + 1} tokens and {rows} rows of its embedding. Resize the embedding to the "
            "tokenizer first: model.resize_token_embeddings(len(tokenizer))."
        )
    for index in range(rows):
        words.setdefault(index, f"[PAD{index}]")
        kinds.setdefault(index, int(types.UNUSED))
    tokens = [words[index] for index in range(rows)]
    merges = [_joined(merge) for merge in model["merges"]]
    if _is_byte_level(content):
        split = _split(content, name)
        return Vocabulary("gpt2", split, tokens, [kinds[index] for index in range(rows)], merges, (), False)
    if not model["byte_fallback"]:
        raise _unknown(name, "its BPE tokenizer falls back on no bytes")
    for word, index in model["vocab"].items():
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[index] = int(types.BYTE)
    if model["unk_token"] is not None:
        kinds[model["vocab"][model["unk_token"]]] = int(types.UNKNOWN)
    scores = _scores(tokens, model["merges"])
    first = _puts_space_first(content, name)
    return Vocabulary("llama", "default", tokens, [kinds[index] for index in range(rows)], (), scores, first)


def write_vocabulary(writer: Any, vocabulary: Vocabulary, tokenizer: Any, stops: Sequence[int]) -> None:
    """Write tokens, flags, special tokens and chat template.

    Args:
        stops: ids of the tokens that end an answer, the tokenizer's own eos among them or not.
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.space_first)
    ids = tokenizer("x").input_ids
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else (stops[0] if stops else None)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, eos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    turn_end = end_of_turn(tokenizer, stops)
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def end_of_turn(tokenizer: Any, stops: Sequence[int]) -> int | None:
    """The token that ends an answer where it is not eos: of `stops`, the one that the chat template writes."""
    others = [token for token in stops if token != tokenizer.eos_token_id]
    template = tokenizer.chat_template or ""
    written = [token for token in others if tokenizer.convert_ids_to_tokens(token) in template]
    chosen = written or others
    return chosen[0] if chosen else None


def _content(tokenizer: Any, name: str) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise _unknown(name, "its tokenizer is a Python one, without a tokenizer.json")
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return content


def _joined(merge: Any) -> str:
    """A merge in one line; newer files hold pairs."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _steps(section: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, splitter or decoder, a sequence taken apart."""
    if section is None:
        return []
    return [step for inner in section[members] for step in _steps(inner, members)] if members in section else [section]


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(content["pre_tokenizer"], "pretokenizers"))


def _split(content: Mapping[str, Any], name: str) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits its text."""
    found: list[str] = []
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            found.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            found.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            found += ["bytes"] if step["use_regex"] else []
        else:
            raise _unknown(name, f"its tokenizer splits by {step['type']} in a way of its own")
    normalizers = {step["type"] for step in _steps(content["normalizer"], "normalizers")}
    if normalizers - {"NFC"}:
        raise _unknown(name, f"its tokenizer normalises text by {', '.join(sorted(normalizers))}")
    key = (tuple(found), bool(content["model"]["ignore_merges"]))
    if key not in SPLITS:
        raise _unknown(name, f"its tokenizer splits text by {' then '.join(found) or 'nothing'}")
    return SPLITS[key]


def _puts_space_first(content: Mapping[str, Any], name: str) -> bool:
    """Whether a SentencePiece tokenizer puts a space before the text, once its steps are known to be the usual ones."""
    first = False
    for step in _steps(content["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            first = True
        elif step["type"] != "Replace" or step["content"] != SPACE:
            raise _unknown(name, f"its tokenizer normalises text by {step['type']}")
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            first = step["prepend_scheme"] != "never"
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise _unknown(name, f"its tokenizer splits by {step['type']}")
    return first


def _scores(tokens: Sequence[str], merges: Sequence[Any]) -> list[float]:
    """Scores under which merging the best neighbours first is merging in the order of `merges`."""
    order: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault("".join(pair), rank)
    return [-float(order[token]) if token in order else 0.0 for token in tokens]


def _unknown(name: str, reason: str) -> BackboneError:
    return BackboneError(
        f"{name} cannot be written as GGUF: {reason}, which llama.cpp does not know under a name that peftkit has. "
        "Serve it with transformers or vLLM, or use llama.cpp's own convert_hf_to_gguf.py."
    )

"""What an engine that serves adapters makes of one: what it refuses, what it would ignore, and what to do about it.

Sources: vLLM's `lora/peft_helper.py` and `config/lora.py`, SGLang's `srt/lora`, TGI's `adapters/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkit.backbones.packaged import PACKAGED, local_path
from peftkit.deploy.parts import Adapter, read_adapter
from peftkit.record import Part

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The choices of vLLM's --max-lora-rank; it defaults to 16."""


@dataclass(frozen=True, slots=True)
class Server:
    """What an engine takes.

    Attributes:
        max_rank: the highest; None where it has no limit of its own.
        modules: leaf names of the linear layers that take a LoRA; None where these depend on the architecture.
        rslora: it heeds use_rslora, instead of scaling by alpha / rank.
        launch: the command, with {base}, {path} and {rank}.
    """

    title: str
    max_rank: int | None
    modules: frozenset[str] | None
    rslora: bool
    launch: str


LINEARS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
FUSED = frozenset({"qkv_proj", "gate_up_proj"})
SERVERS = {
    "vllm": Server(
        "vLLM", 512, None, True, "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={path}"
    ),
    "sglang": Server(
        "SGLang",
        None,
        LINEARS | FUSED | {"embed_tokens", "lm_head"},
        False,
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
        "--lora-paths tuned={path}",
    ),
    "tgi": Server(
        "TGI",
        128,
        LINEARS | {"lm_head"},
        True,
        "text-generation-launcher --model-id {base} --lora-adapters tuned={path}",
    ),
}


class Change(Part):
    """One thing that stands in the way, and what to do."""

    problem: str
    remedy: str


class ServingReport(Part):
    """Whether an engine serves an adapter as it is; `command` starts it where it does."""

    adapter: str
    engine: str
    accepted: bool
    rank: int | None = None
    changes: tuple[Change, ...]
    command: str | None = None


def check_serving(path: str | Path, engine: str) -> ServingReport:
    """Hold an adapter's folder against what an engine accepts. Nothing is loaded but the adapter.

    Raises:
        InputError: no adapter, or files that cannot be understood.
    """
    adapter, server = read_adapter(path), SERVERS[engine]
    changes = tuple(_obstacles(adapter, server))
    ranks = [factors.rank for factors in adapter.unscaled.values()]
    rank = max(ranks) if ranks else None
    command = None
    if not changes and rank is not None:
        allowed = next(each for each in VLLM_RANKS if each >= rank) if engine == "vllm" else rank
        command = server.launch.format(base=_base_of(adapter), path=adapter.folder, rank=allowed)
    return ServingReport(
        adapter=str(path), engine=server.title, accepted=not changes, rank=rank, changes=changes, command=command
    )


def _base_of(adapter: Adapter) -> str:
    """The base as an engine finds it: other engines know nothing of packaged backbones' names."""
    name = adapter.base_name or "BASE"
    return str(local_path(name)) if name in PACKAGED else name


def _obstacles(adapter: Adapter, server: Server) -> Iterator[Change]:
    config, path = adapter.config, adapter.path
    merge = f"merge it and serve the model: peftkit merge {path} --out MERGED"
    if config.peft_type.value != "LORA":
        yield _change(
            f"{server.title} serves LoRA alone, and this is {config.peft_type.value}", f"{merge}; or method=lora"
        )
        return
    if adapter.head.kind == "classification":
        yield _change(f"{server.title} serves no classification head with an adapter", merge)
    elif adapter.saved:
        names = ", ".join(sorted(set(config.modules_to_save)))
        yield _change(f"modules_to_save ({names}) was trained whole, which {server.title} does not load", merge)
    if config.use_dora:
        yield _change(f"{server.title} knows no DoRA", f"{merge}; or train with method.dora=false")
    if config.bias != "none":
        yield _change(f"bias={config.bias} trained biases, which {server.title} refuses", merge)
    if adapter.rewrites_base:
        yield _change(
            f"init_lora_weights={config.init_lora_weights} changed the base that it was trained on, and {server.title} "
            "puts it on the unchanged one",
            f"make a plain LoRA of it: peftkit combine {path} --no-score --out PLAIN; or {merge}",
        )
    yield from _numbers(adapter, server, merge)
    yield from _places(adapter, server, merge)


def _numbers(adapter: Adapter, server: Server, merge: str) -> Iterator[Change]:
    """Rank and scaling."""
    config, path = adapter.config, adapter.path
    ranks = {factors.rank for factors in adapter.unscaled.values()}
    highest = max(ranks, default=0)
    if server.max_rank is not None and highest > server.max_rank:
        yield _change(
            f"rank {highest} is above the {server.max_rank} that {server.title} takes",
            f"peftkit resize {path} --rank {server.max_rank} --out SMALLER, which says what it loses",
        )
    common = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    if any(abs(adapter.scaling(name) - common) > 1e-9 for name in adapter.unscaled):
        yield _change(
            f"rank_pattern and alpha_pattern scale modules apart, and {server.title} scales all by one number",
            f"fold the scales into the weights: peftkit combine {path} --no-score --out PLAIN",
        )
    if config.use_rslora and not server.rslora:
        yield _change(
            f"{server.title} scales by alpha / rank and ignores use_rslora",
            f"fold the scale into the weights: peftkit combine {path} --no-score --out PLAIN; or {merge}",
        )


def _places(adapter: Adapter, server: Server, merge: str) -> Iterator[Change]:
    """Where it adds something."""
    outside = sorted({name.rpartition(".")[2] for name in adapter.unscaled if ".layers." not in f".{name}"})
    if outside and server.modules is None:
        yield _change(
            f"it changes {', '.join(outside)}, outside the blocks, which {server.title} does not adapt", merge
        )
    leaves = {name.rpartition(".")[2] for name in adapter.unscaled}
    strange = sorted(leaves - server.modules) if server.modules is not None else []
    if strange:
        yield _change(f"{server.title} adapts no {', '.join(strange)}", f"{merge}; or train with other method.targets")
    known = {name for name in adapter.beyond if name not in adapter.saved}
    odd = sorted(name for name in known if "lora_magnitude" not in name and not name.endswith(".bias"))
    if odd:
        yield _change(f"it holds {odd[0]}, which {server.title} has no place for", merge)


def _change(problem: str, remedy: str) -> Change:
    return Change(problem=problem, remedy=remedy)

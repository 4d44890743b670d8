"""How close the planner comes to memory that others measured on GPUs and published.

    python benchmarks/plan_accuracy.py [--t4 CSV] [--l40s CSV] [--json] [--record]

Each row is simulated as its own trainer runs: errors are predicted / measured - 1. `--record` keeps the table for
`benchmarks/publish.py`, and the largest underestimate as the planner's margin.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.backbones.configs import bundled_config
from peftkit.backbones.quiet import quietly
from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.peer import PeerSettings, simulate_peer
from peftkit.plan.planner import RECORDED
from peftkit.units import MIB, format_bytes

RESULTS = Path(__file__).parent / "results" / "plan-accuracy"
REFERENCE = Path(__file__).parent / "reference"
LONGEST = 676
"""Tokens of an example of the L40S runs' longest batch, which sets their peak; it is not recorded."""
TYPICAL = 300
"""And of the batch before it, whose outputs are still alive."""
FAMILIES = {"qwen3": "qwen3", "qwen2": "qwen2", "mistral": "mistral", "phi-3": "phi3", "gemma-3": "gemma3_text"}
"""Of models whose configuration is not at hand: transformers' model type by what their name contains; else llama."""
DIMENSIONS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_word_embeddings",
}
T4, L40S = Architecture((7, 5), 141 * MIB), Architecture((8, 9), 450 * MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t4", type=Path, default=REFERENCE / "t4_measured_runs.csv")
    parser.add_argument("--l40s", type=Path, default=REFERENCE / "l40s_published_runs.csv")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    say: Callable[[str], None] = (lambda text: None) if options.json else print
    t4 = [_compare_t4(row, say) for row in _with_dimensions(_read(options.t4))]
    l40s = [_compare_l40s(row, say) for row in _read(options.l40s)]
    found = {"t4": _summary(t4, ("allocated", "reserved")), "l40s": _summary(l40s, ("reserved",))}
    if options.record:
        _record(t4, l40s)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for name, part in found.items():
        for kind in ("allocated", "reserved"):
            if kind in part and part["rows"]:
                errors = part[kind]
                print(f"{name} {kind}: mean {errors['mean_abs_error']:.2%}, worst {errors['worst_abs_error']:.2%}")


def _record(t4: list[dict[str, Any]], l40s: list[dict[str, Any]]) -> None:
    """Write the margin into the package, and the rows where the results lie."""
    below = [-row[kind]["error"] for row in (*t4, *l40s) for kind in ("allocated", "reserved") if kind in row]
    write_json(RECORDED, {"largest_underestimate": round(max(0.0, *below), 4)})
    for name, rows in (("t4", t4), ("l40s", l40s)):
        write_json(
            RESULTS / f"{name}.json",
            {
                "note": f"{name.upper()}: memory that others measured, and the planner's error.",
                "command": "python benchmarks/plan_accuracy.py --record",
                "rows": [{"run": row["name"]} | _shown(row) for row in rows],
                "environment": describe_environment(),
            },
        )


def _shown(row: dict[str, Any]) -> dict[str, str]:
    kinds = [kind for kind in ("allocated", "reserved") if kind in row]
    measured = {kind: format_bytes(row[kind]["measured_bytes"]) for kind in kinds}
    return measured | {f"error {kind}": f"{row[kind]['error']:+.2%}" for kind in kinds}


def _compare_t4(row: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """One LoRA run with checkpointing on unpadded batches, without a cache; attention repeats keys and values."""
    from peft import LoraConfig

    rank, length = int(row["lora_r"]), int(row["seq_len"])
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=row["targets"].split("|"), task_type="CAUSAL_LM")
    settings = PeerSettings(
        batch=int(row["batch"]),
        lengths=(length, length),
        adapter=adapter,
        precision=row["precision"],
        quantization=row["quant"],
        double_quantization=row["double_quant"] == "True",
        attention=row["attn"],
        repeat_heads=True,
        checkpointing=row["gc"] == "True",
        loads_on_device=row["quant"] != "none",
        architecture=T4,
    )
    found = simulate_peer(settings, _config(row["model"], json.loads(row["model_config"])))
    name = f"{row['model']} {length}x{row['batch']} {row['attn']} {row['quant']}"
    sizes = {
        "allocated": (found.allocated_bytes, "peak_allocated_mib"),
        "reserved": (found.reserved_bytes, "peak_reserved_mib"),
    }
    return _row(name, {kind: (size, float(row[key]) * MIB) for kind, (size, key) in sizes.items()}, found.phase, say)


def _compare_l40s(row: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """One run on padded batches with the cache on, its outputs kept until those of the next step."""
    settings = PeerSettings(
        batch=int(row["batch_size"]),
        lengths=(TYPICAL, LONGEST),
        adapter=_adapter(row),
        precision="bf16",
        checkpointing=row["use_gc"] == "True",
        padded=True,
        cache=True,
        keeps_outputs=True,
        clip=bool(row["grad_norm_clip"]),
        empties_cache=True,
        architecture=L40S,
    )
    found = simulate_peer(settings, _config(f"{row['model']}-Instruct", {}))
    measured = int(row["mem_max_bytes"]) + 2 * MIB
    return _row(row["experiment"], {"reserved": (found.reserved_bytes, measured)}, found.phase, say)


def _adapter(row: dict[str, Any]) -> Any:
    """PEFT's configuration of a row; None for full finetuning."""
    import peft

    if row["peft_type"] == "FULL":
        return None
    options: dict[str, Any] = json.loads(row["other_peft_config"]) | {"task_type": "CAUSAL_LM"}
    if row["rank"]:
        options["r"] = int(float(row["rank"]))
    if row["num_virtual_tokens"]:
        options["num_virtual_tokens"] = int(float(row["num_virtual_tokens"]))
    if row["target_modules"]:
        options["target_modules"] = json.loads(row["target_modules"])
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[row["peft_type"]]
    known = config_class.__dataclass_fields__
    return config_class(**{key: value for key, value in options.items() if key in known})


def _config(model: str, dimensions: dict[str, Any]) -> Any:
    """The model's published configuration where it is at hand, else its family's, with the dimensions of the row."""
    from transformers import AutoConfig

    bundled = bundled_config(model)
    named = {DIMENSIONS[key]: value for key, value in dimensions.items() if key in DIMENSIONS}
    with quietly():
        if bundled is not None:
            config = AutoConfig.from_pretrained(str(bundled))
            for key, value in named.items():
                setattr(config, key, value)
            return config
        family = next((kind for word, kind in FAMILIES.items() if word in model.lower()), "llama")
        return AutoConfig.for_model(family, **named)


def _row(name: str, sizes: dict[str, tuple[int, float]], phase: str, say: Callable[[str], None]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "phase": phase}
    for kind, (predicted, measured) in sizes.items():
        row[kind] = {"predicted_bytes": predicted, "measured_bytes": round(measured), "error": predicted / measured - 1}
    say(name + "".join(f"  {kind} {row[kind]['error']:+.2%}" for kind in sizes) + f"  peak in {phase}")
    return row


def _summary(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        errors = [abs(row[kind]["error"]) for row in rows]
        if errors:
            found[kind] = {"mean_abs_error": sum(errors) / len(errors), "worst_abs_error": max(errors)}
    return found | {"rows": rows}


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _with_dimensions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without dimensions take those of another row of their model, from this file or the reference one."""
    known = {
        row["model"]: row["model_config"]
        for row in (*_read(REFERENCE / "t4_measured_runs.csv"), *rows)
        if row["model_config"] != "{}"
    }
    return [row | {"model_config": known.get(row["model"], row["model_config"])} for row in rows]


if __name__ == "__main__":
    main()

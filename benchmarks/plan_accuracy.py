"""How close the planner comes to memory that others measured on GPUs and published.

    python benchmarks/plan_accuracy.py [--t4 CSV] [--l40s CSV] [--json] [--record]

Each row is simulated as its own trainer runs: errors are predicted / measured - 1. `--record` keeps the table for
`benchmarks/publish.py`, and the largest underestimate as the planner's margin.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from families import config_of

from peftkit.environment import describe_environment
from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.plan.cuda_operators import Architecture
from peftkit.plan.peer import PeerSettings, simulate_peer
from peftkit.plan.planner import record_margin
from peftkit.units import MIB, format_bytes

RESULTS = Path(__file__).parent / "results" / "plan-accuracy"
REFERENCE = Path(__file__).parent / "reference"
LONGEST = 676
"""Tokens of an example of the L40S runs' longest batch, which sets their peak; it is not recorded."""
TYPICAL = 300
"""And of the batch before it, whose outputs are still alive."""
QUANTIZATIONS = ("none", "", "nf4", "fp4")
"""FP4 takes what NF4 takes."""
Say = Callable[[str], None]
T4, L40S = Architecture((7, 5), 141 * MIB), Architecture((8, 9), 450 * MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t4", type=Path, default=REFERENCE / "t4_measured_runs.csv")
    parser.add_argument("--l40s", type=Path, default=REFERENCE / "l40s_published_runs.csv")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    say: Say = (lambda text: None) if options.json else print
    t4 = [_try(_compare_t4, row, _name_t4(row), say) for row in _with_dimensions(_read(options.t4))]
    l40s = [_try(_compare_l40s, row, row["experiment"], say) for row in _read(options.l40s)]
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
    t4, l40s = ([row for row in rows if "error" in row.get("reserved", {})] for rows in (t4, l40s))
    record_margin("cuda", [row["reserved"]["error"] for row in (*t4, *l40s)])
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
    kinds = [kind for kind in ("allocated", "reserved") if "error" in row.get(kind, {})]
    measured = {kind: format_bytes(row[kind]["measured_bytes"]) for kind in kinds}
    return measured | {f"error {kind}": f"{row[kind]['error']:+.2%}" for kind in kinds}


def _compare_t4(row: dict[str, Any], say: Say) -> dict[str, Any]:
    """One run, LoRA or full, on unpadded batches, without a cache; attention repeats keys and values."""
    length, targets = _count(row["seq_len"]), _words(row["targets"])
    quantized = row["quant"] not in ("none", "")
    if row["quant"] not in QUANTIZATIONS:
        raise InputError(f"quant={row['quant']} cannot be simulated")
    settings = PeerSettings(
        batch=_count(row["batch"]),
        lengths=(length, length),
        adapter=_lora(row, targets),
        optimizer=_optimizer(row["optimizer"]),
        precision=_precision(row["precision"]),
        quantization="nf4" if quantized else "none",
        double_quantization=_is_set(row["double_quant"]),
        attention="eager" if row["attn"] == "eager" else "sdpa",
        repeat_heads=True,
        checkpointing=_is_set(row["gc"]),
        loads_on_device=quantized,
        architecture=T4,
    )
    named = targets if _count(row["lora_r"]) and targets != ["all-linear"] else []
    config = config_of(row["model"], json.loads(row["model_config"] or "{}"), named)
    if settings.attention == "sdpa" and getattr(config, "attn_logit_softcapping", None):
        config.attn_logit_softcapping = None  # versions that ran it so left it out
    found = simulate_peer(settings, config)
    sizes = {
        "allocated": (found.allocated_bytes, _mib(row["peak_allocated_mib"])),
        "reserved": (found.reserved_bytes, _mib(row["peak_reserved_mib"])),
    }
    return _row(_name_t4(row), sizes, found.phase, say)


def _name_t4(row: dict[str, Any]) -> str:
    return f"{row['model']} {row['seq_len']}x{row['batch']} {row['attn']} {row['quant']}"


def _lora(row: dict[str, Any], targets: list[str]) -> Any:
    """PEFT's configuration of a row; None for full finetuning, which has no rank."""
    from peft import LoraConfig

    rank = _count(row["lora_r"])
    if not rank:
        return None
    chosen: Any = "all-linear" if targets in ([], ["all-linear"]) else targets
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=chosen, task_type="CAUSAL_LM")


def _compare_l40s(row: dict[str, Any], say: Say) -> dict[str, Any]:
    """One run on padded batches with the cache on, its outputs kept until those of the next step."""
    settings = PeerSettings(
        batch=_count(row["batch_size"]),
        lengths=(TYPICAL, LONGEST),
        adapter=_adapter(row),
        optimizer=_optimizer(row["optimizer"]),
        narrow_adapters=row["autocast_adapter_dtype"] == "False",
        precision=_precision(row["dtype"] or "bfloat16"),
        checkpointing=_is_set(row["use_gc"]),
        padded=True,
        cache=not _is_set(row["use_gc"]),  # transformers turns it off where layers are recomputed
        keeps_outputs=True,
        clip=bool(row["grad_norm_clip"]),
        empties_cache=True,
        architecture=L40S,
    )
    found = simulate_peer(settings, config_of(f"{row['model']}-Instruct", {}))
    measured = int(float(row["mem_max_bytes"])) + 2 * MIB if row["mem_max_bytes"] else None
    return _row(row["experiment"], {"reserved": (found.reserved_bytes, measured)}, found.phase, say)


def _adapter(row: dict[str, Any]) -> Any:
    """PEFT's configuration of a row; None for full finetuning."""
    import peft

    if row["peft_type"] == "FULL":
        return None
    options: dict[str, Any] = json.loads(row["other_peft_config"] or "{}") | {"task_type": "CAUSAL_LM"}
    if row["rank"]:
        options["r"] = _count(row["rank"])
    if row["num_virtual_tokens"]:
        options["num_virtual_tokens"] = _count(row["num_virtual_tokens"])
    if row["target_modules"]:
        targets = row["target_modules"]
        options["target_modules"] = json.loads(targets) if targets.startswith(("[", '"')) else targets
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[row["peft_type"]]
    known = config_class.__dataclass_fields__
    return config_class(**{key: value for key, value in options.items() if key in known})


def _optimizer(name: str) -> Any:
    """The optimizer that a trainer's name for it stands for."""
    plain = name.lower().replace("_", "").replace("-", "")
    if plain.startswith("sgd"):
        return "sgd"
    return ("paged-" if "paged" in plain else "") + "adamw" + ("-8bit" if "8bit" in plain else "")


def _precision(name: str) -> Any:
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(name, name)


def _is_set(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "yes")


def _count(text: str) -> int:
    """A whole number, also where a table has it as `32.0`; 0 for an empty cell."""
    return int(float(text or 0))


def _words(text: str) -> list[str]:
    return [word for word in text.split("|") if word]


def _mib(text: str) -> float | None:
    return float(text) * MIB if text else None


def _try(
    compare: Callable[[dict[str, Any], Say], dict[str, Any]], row: dict[str, Any], name: str, say: Say
) -> dict[str, Any]:
    """A row's comparison; one that cannot be simulated says why, and counts in no mean."""
    try:
        return compare(row, say)
    except (InputError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as fault:
        trouble = f"{type(fault).__name__}: {fault}"
        print(f"{name}: not simulated: {trouble}", file=sys.stderr)
        return {"name": name, "trouble": trouble}


def _row(name: str, sizes: dict[str, tuple[int, float | None]], phase: str, say: Say) -> dict[str, Any]:
    """What was predicted, and how far it is from what was measured, where that was."""
    row: dict[str, Any] = {"name": name, "phase": phase}
    text = name
    for kind, (predicted, measured) in sizes.items():
        row[kind] = {"predicted_bytes": predicted}
        shown = format_bytes(predicted)
        if measured is not None:
            error = predicted / measured - 1
            row[kind] |= {"measured_bytes": round(measured), "error": error}
            shown = f"{error:+.2%}"
        text += f"  {kind} {shown}"
    say(f"{text}  peak in {phase}")
    return row


def _summary(rows: list[dict[str, Any]], kinds: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        errors = [abs(row[kind]["error"]) for row in rows if "error" in row.get(kind, {})]
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
        if row["model_config"] not in ("", "{}")
    }
    return [row | {"model_config": known.get(row["model"], row["model_config"])} for row in rows]


if __name__ == "__main__":
    main()

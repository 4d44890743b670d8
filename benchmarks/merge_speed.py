"""What a merge costs beside a plain copy and beside PEFT's own: `python benchmarks/merge_speed.py --gib 3`.

A Llama of random bfloat16 weights in shards, and a LoRA of random numbers on all its linear layers. Each way runs in a
process of its own, which says how long the work itself took, imports apart, until the files were synced; the most
memory that the process ever held counts everything, imports too. The proof of the result is another stage, timed by
itself. It needs four times the model's size in the temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny_models import byte_tokenizer

from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.units import format_bytes, format_seconds

RESULTS = Path(__file__).parent / "results" / "merge-speed"
HIDDEN, INNER, VOCAB, HEADS = 2048, 8192, 32000, 32
RANK = 16
ROOM = 400 * 2**20
WAYS = {
    "copy": "plain copy",
    "peftkit": "peftkit merge",
    "peftkit-fine": "peftkit merge, delta finer than bfloat16",
    "peft": "merge_and_unload, save_pretrained",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-proof", action="store_true")
    parser.add_argument("--work", nargs="+", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        return work(options.work[0], Path(options.work[1]), *map(int, options.work[2:]))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        asked = [str(int(options.gib * 2**30)), str(options.shard_mib * 2**20)]
        # in a process of its own: a child's high water begins at what its parent held
        subprocess.run([sys.executable, __file__, "--work", "lay", str(home), *asked], check=True)
        sizes = [file.stat().st_size for file in (home / "base").glob("*.safetensors")]
        size, largest = sum(sizes), max(sizes)
        timed = {way: [measure(way, home) for _ in range(options.repeats)] for way in WAYS}
        rows = rows_of(timed, largest)
        if not options.no_proof:
            rows += [proof_row(home)]
    for row in rows:
        print("  ".join(row.values()), flush=True)
    document = {
        "note": f"A Llama of {format_bytes(size)} in bfloat16, largest shard {format_bytes(largest)}, LoRA of rank "
        f"{RANK} on all linear layers; medians of {options.repeats}, files synced. The bound of a merge: three copies, "
        "and twice the largest shard with 400 MiB.",
        "command": f"python benchmarks/merge_speed.py --gib {options.gib:g} --repeats {options.repeats}"
        + (" --no-proof" if options.no_proof else ""),
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / "merge-speed.json", document)
    return 0 if all("over" not in value for row in rows for value in row.values()) else 1


def lay(home: Path, size: int, shard: int) -> None:
    """Write base and adapters."""
    import torch
    from transformers import LlamaConfig

    from peftkit.deploy.shards import ShardWriter

    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER
    layers = max(1, round((size // 2 - 2 * VOCAB * HIDDEN) / layer))
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    linears: dict[str, tuple[int, int]] = {}
    for index in range(layers):
        inside = f"model.layers.{index}"
        square = {f"{inside}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        wide = {f"{inside}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        linears |= square | wide | {f"{inside}.mlp.down_proj": (HIDDEN, INNER)}
        shapes |= {f"{name}.weight": shape for name, shape in linears.items() if name.startswith(f"{inside}.")}
        shapes |= {f"{inside}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    held = 0
    for name, shape in shapes.items():
        amount = 2 * int(torch.Size(shape).numel())
        if parts[-1] and held + amount > shard:
            parts.append({})
            held = 0
        parts[-1][name] = shape
        held += amount
    base, generator = home / "base", torch.Generator().manual_seed(0)
    base.mkdir()
    places = {}
    for index, part in enumerate(parts, 1):
        file = f"model-{index:05}-of-{len(parts):05}.safetensors"
        places |= dict.fromkeys(part, file)
        with ShardWriter(base / file, {name: (torch.bfloat16, shape) for name, shape in part.items()}) as writer:
            for name, shape in part.items():
                ones = len(shape) == 1
                values = torch.ones(shape) if ones else torch.randn(shape, generator=generator) * HIDDEN**-0.5
                writer.write(name, values.bfloat16())
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype=torch.bfloat16,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    for name, amount in (("adapter", 1e-2), ("adapter-fine", 1e-4)):
        lay_adapter(home / name, base, linears, amount)


def lay_adapter(folder: Path, base: Path, linears: dict[str, tuple[int, int]], amount: float) -> None:
    """A LoRA whose B has numbers of this size."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (outputs, inputs) in linears.items():
        inside = f"base_model.model.{name}"
        tensors[f"{inside}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * inputs**-0.5
        tensors[f"{inside}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * amount
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linears})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=leaves, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))


def measure(way: str, home: Path) -> dict[str, float]:
    """Run one way in a process of its own: seconds of the work, and the most bytes that the process held."""
    shutil.rmtree(home / "out", ignore_errors=True)
    os.sync()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen([sys.executable, __file__, "--work", way, str(home)], stdout=output)
        _, status, usage = os.wait4(child.pid, 0)  # of this child alone
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0, f"{way} ended with {child.returncode}"
        output.seek(0)
        seconds = float(output.read().split()[-1])
    return {"seconds": seconds, "cpu": usage.ru_utime + usage.ru_stime, "peak": 1024 * usage.ru_maxrss}


def work(way: str, home: Path, *sizes: int) -> int:
    """Do it, and print the seconds that it took."""
    base, out = home / "base", home / "out"
    if way == "lay":
        lay(home, *sizes)
        return 0
    if way == "copy":
        started = time.perf_counter()
        shutil.copytree(base, out)
    elif way == "peft":
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, home / "adapter").merge_and_unload().save_pretrained(out)
    else:
        from peftkit.deploy.adapter import read_source
        from peftkit.deploy.fold import fold_by_tensor
        from peftkit.files import staged_folder

        adapter = home / way.replace("peftkit", "adapter")
        source = read_source(adapter)  # what the command line imports is imported by now
        started = time.perf_counter()
        with staged_folder(out) as staging:
            fold_by_tensor(source, staging, onto="dequantized", say=lambda text: None)
    for file in out.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    print(time.perf_counter() - started)
    return 0


def rows_of(timed: dict[str, list[dict[str, float]]], largest: int) -> list[dict[str, str]]:
    """The medians of each way, against the bounds."""
    middle = {way: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for way, runs in timed.items()}
    rows = []
    for way, found in middle.items():
        ratio = found["seconds"] / middle["copy"]["seconds"]
        bounded = way.startswith("peftkit")
        late = bounded and ratio > 3
        large = bounded and found["peak"] > 2 * largest + ROOM
        rows.append(
            {
                "way": WAYS[way],
                "wall": format_seconds(found["seconds"]),
                "copies": f"{ratio:.2f}" + (" (over 3)" if late else ""),
                "CPU": format_seconds(found["cpu"]),
                "memory": format_bytes(int(found["peak"])) + (" (over the bound)" if large else ""),
                "bound": format_bytes(2 * largest + ROOM) if bounded else "",
            }
        )
    return rows


def proof_row(home: Path) -> dict[str, str]:
    """The proof of the merge, layer by layer."""
    measure("peftkit", home)
    byte_tokenizer().save_pretrained(home / "out")
    command = [sys.executable, "-m", "peftkit.cli", "verify", str(home / "adapter"), str(home / "out"), "--streamed"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        done = subprocess.run([*command, "--json"], stdout=output, check=False)
        seconds = time.perf_counter() - started
        output.seek(0)
        proof: dict[str, Any] = json.load(output)
    assert done.returncode == 0, proof["verification"]["failures"]
    positions = proof["verification"]["difference"]["positions"]
    told = f"its proof, layer by layer, {positions} positions"
    return {"way": told, "wall": format_seconds(seconds), "copies": "", "CPU": "", "memory": "", "bound": ""}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Merge an adapter of every method on every kind of model: `python benchmarks/round_trips.py`.

Adapters of random numbers, float32, on the two packaged backbones and on random models of five families. A cell is the
top-1 agreement of the merged model, read back from disk, with the live adapter; the command exits 1 where one is below
100 %, or where the proof fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tiny_models import ENCODERS, write_tiny

from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.environment import describe_environment
from peftkit.files import write_json

RESULTS = Path(__file__).parent / "results" / "round-trips"
SENTIMENT = Head("classification", ("bad", "good"), "single_label_classification")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "rslora": ("LoraConfig", {"r": 16, "use_rslora": True, "target_modules": "all-linear"}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": "all-linear"}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa", "target_modules": "all-linear"}),
    "olora": ("LoraConfig", {"r": 4, "init_lora_weights": "olora", "target_modules": "all-linear"}),
    "biases": ("LoraConfig", {"r": 4, "bias": "all", "target_modules": "all-linear"}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "vera": ("VeraConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "hra": ("HRAConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
    "miss": ("MissConfig", {"r": 4}),
}
TARGETS = {
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "llama": ["q_proj", "o_proj"],
    "qwen2": ["q_proj", "o_proj"],
    "gemma": ["q_proj", "o_proj"],
    "phi": ["q_proj", "dense"],
}
"""Linear layers as wide as they are high, which is what some methods need."""
WHOLE = "100 %"
PACKAGED = {"minilm-l6": "bert", "smollm2-135m": "llama"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip", choices=PACKAGED, action="append", default=[], help="leave a packaged backbone out")
    options = parser.parse_args(arguments)
    rows, agreed = [], True
    with tempfile.TemporaryDirectory() as folder:
        bases = {name: (name, family) for name, family in PACKAGED.items() if name not in options.skip}
        for family in ("t5", "qwen2", "gemma", "phi"):
            bases[f"random {family}"] = (str(write_tiny(Path(folder) / family, family)), family)
        for method in METHODS:
            cells = {}
            for number, (name, (base, family)) in enumerate(bases.items()):
                cells[name] = round_trip(Path(folder) / f"{method}-{number}", base, family, method)
                agreed = agreed and cells[name] == WHOLE
            rows.append({"method": method, **cells})
            print("  ".join(rows[-1].values()), flush=True)
    document = {
        "note": "Top-1 agreement of the merged model, read back from disk, with the live adapter of random numbers; in "
        "float32. Each cell's proof passed.",
        "command": "python benchmarks/round_trips.py" + "".join(f" --skip {name}" for name in options.skip),
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / "round-trips.json", document)
    return 0 if agreed else 1


def round_trip(home: Path, base: str, family: str, method: str) -> str:
    """Make an adapter and merge it; the agreement, or what went wrong."""
    from peftkit.deploy import merge as merging
    from peftkit.deploy.verify import examine
    from peftkit.errors import PeftkitError

    merging.prove = examine  # by the same code in this process: there is no need to import torch ninety times
    head = SENTIMENT if family in ENCODERS else LANGUAGE_HEAD
    adapt(home / "adapter", base, configure(method, family), head=head)
    try:
        found = merging.merge(home / "adapter", home / "out").verification.difference
    except PeftkitError as fault:
        print(f"{method} on {base}: {fault}", file=sys.stderr, flush=True)
        return "failed"
    assert found is not None
    share = found.top1_agreement or 0.0
    return WHOLE if share == 1.0 else f"{100 * share:.2f} %"


def configure(method: str, family: str) -> Any:
    """PEFT's configuration of a method for a family."""
    import peft

    kind, settings = METHODS[method]
    usual: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": TARGETS[family]}
    if family in ENCODERS:
        usual |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "classification_head"]}
    return getattr(peft, kind)(**{**usual, **settings})


def adapt(folder: Path, base: str | Path, config: Any, *, head: Head = LANGUAGE_HEAD, **spec: Any) -> Any:
    """An adapter whose trainable numbers have all moved, saved as from elsewhere; returns its live model."""
    import peft
    import torch

    from peftkit.backbones.load import load_backbone
    from peftkit.backbones.spec import BackboneSpec

    torch.manual_seed(1)
    numbers = {"dtype": "float32", "quantization": "none", **spec}
    backbone = load_backbone(BackboneSpec(name=str(base), **numbers), head)
    model = peft.get_peft_model(backbone.model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    write_json(folder / "head.json", {"kind": head.kind, "labels": head.labels, "problem": head.problem})
    write_json(folder / "base.json", {"name": str(base), **numbers})
    return model.eval()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

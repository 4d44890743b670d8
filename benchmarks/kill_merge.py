"""Kill merges at random moments, and fill their disk: `python benchmarks/kill_merge.py --kills 20`.

Each merge runs in a process of its own that is ended with SIGKILL after a random part of the time that a whole merge
takes, or that may write no file beyond a random size. Afterwards base and adapter are what they were, the output is
whole or not there, and the next merge succeeds and leaves nothing beside it. Exits 1 where any of that does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_models import write_tiny

from peftkit.cache import file_sha256
from peftkit.environment import describe_environment
from peftkit.errors import OutputError, PeftkitError
from peftkit.files import STAGING_PREFIX, write_json

RESULTS = Path(__file__).parent / "results" / "kill-merge"
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
REFUSED, BROKEN = 3, 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        home = lay(Path(folder))
        rows = [kill_all(home, options.kills, options.seed), fill_all(home, options.kills, options.seed)]
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    document = {
        "note": "Merges ended at random moments, by SIGKILL and by a disk that takes no more. After each one: whether "
        "the input is intact, whether an output stands that is not whole, and whether the next merge succeeds.",
        "command": f"python benchmarks/kill_merge.py --kills {options.kills} --seed {options.seed}",
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / "kill-merge.json", document)
    return (
        0 if all(row["input damaged"] == row["half outputs"] == row["next merge failed"] == "0" for row in rows) else 1
    )


def lay(home: Path, **sizes: int) -> Path:
    """A base in shards, an adapter for it, and room for outputs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_tiny(home / "base", "llama", shard_size="5MB", **{**SIZES, **sizes})
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(home / "adapter")
    (home / "outputs").mkdir()
    return home


def kill_all(home: Path, count: int, seed: int) -> dict[str, str]:
    """End merges with SIGKILL, each at a random moment of its work."""
    started = time.perf_counter()
    assert run(home, lambda: None) == 0
    whole_seconds = time.perf_counter() - started
    clear(home)
    chance = random.Random(seed)
    moments = [chance.uniform(0, whole_seconds) for _ in range(count)]
    return tally("kill -9", home, [lambda moment=moment: run(home, lambda: None, moment) for moment in moments])


def fill_all(home: Path, count: int, seed: int) -> dict[str, str]:
    """Let merges write files up to a random size only."""
    largest = max(file.stat().st_size for file in (home / "base").glob("*.safetensors"))
    chance = random.Random(seed)

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    sizes = [chance.randrange(0, largest) for _ in range(count)]
    return tally("full disk", home, [lambda size=size: run(home, limit(size)) for size in sizes])


def tally(what: str, home: Path, attempts: list[Callable[[], int]]) -> dict[str, str]:
    """Make each attempt, look at what it left, then merge undisturbed."""
    before = contents(home)
    ended = finished = damaged = half = failed = left = 0
    for attempt in attempts:
        code = attempt()
        ended += code != 0
        finished += code == 0
        damaged += contents(home) != before
        half += (home / "outputs" / "model").exists() and not is_whole(home / "outputs" / "model")
        failed += run(home, lambda: None) != 0 or not is_whole(home / "outputs" / "model")
        left += any((home / "outputs").glob(f"{STAGING_PREFIX}*"))
        clear(home)
    return {
        "ended by": what,
        "merges": str(len(attempts)),
        "ended early": str(ended),
        "input damaged": str(damaged),
        "half outputs": str(half),
        "next merge failed": str(failed),
        "something left beside it": str(left),
    }


def run(home: Path, prepare: Callable[[], None], moment: float | None = None) -> int:
    """Merge in a forked process, so that no time goes into imports; ended after `moment` seconds. Its exit code."""
    from peftkit.deploy import merge as merging
    from peftkit.deploy.verify import examine

    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            prepare()
            merging.prove = examine  # in this process: what is asked of the models is no part of this
            merging.merge(home / "adapter", home / "outputs" / "model", base=str(home / "base"))
            code = 0
        except OutputError:
            code = REFUSED
        except PeftkitError as fault:
            print(fault, file=sys.stderr)
        finally:
            os._exit(code)
    if moment is not None:
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(home: Path) -> dict[str, str]:
    """Digests of everything that a merge reads."""
    files = [file for name in ("base", "adapter") for file in sorted((home / name).rglob("*")) if file.is_file()]
    return {str(file): file_sha256(file) for file in files}


def is_whole(model: Path) -> bool:
    """Whether a merged model has its report, and every file that it tells of, as it was written."""
    if not (model / "merge_report.json").is_file():
        return False
    report: dict[str, Any] = json.loads((model / "merge_report.json").read_text(encoding="utf-8"))
    files = report["files"].items()
    return report["status"] == "ok" and all(file_sha256(model / name) == digest for name, digest in files)


def clear(home: Path) -> None:
    """Take the outputs away."""
    shutil.rmtree(home / "outputs")
    (home / "outputs").mkdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

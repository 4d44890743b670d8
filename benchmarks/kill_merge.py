"""Kill merges and exports at random moments, and fill their disk: `python benchmarks/kill_merge.py --what gguf`.

Each run is a process of its own that is ended with SIGKILL after a random part of the time that a whole one takes, or
that may write no file beyond a random size. Afterwards what it reads is what it was, the output is that of an
undisturbed run or not there, and the next run gives that output and leaves nothing beside it. Exits 1 where any of
that does not hold.
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
from functools import partial
from importlib import import_module
from pathlib import Path

from tiny_models import write_tiny

from peftkit.cache import file_sha256
from peftkit.environment import describe_environment
from peftkit.errors import OutputError, PeftkitError
from peftkit.files import STAGING_PREFIX, write_json

RESULTS = Path(__file__).parent / "results" / "kill-merge"
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
WORK = ("merge", "gguf", "ollama", "onnx")
FAULTS = ("input damaged", "half outputs", "next run failed", "next output differs", "something left beside it")
REPORTS = ("merge_report.json", "export_report.json")
REFUSED, BROKEN = 3, 4


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=WORK, default="merge")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        home = lay(Path(folder))
        rows = [end(home, options.kills, options.seed, what=options.what) for end in (kill_all, fill_all)]
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    document = {
        "note": "Merges and exports ended at random moments, by SIGKILL and by a disk that takes no more. After each "
        "one: whether the input is intact, whether an output stands that is not whole, and whether the next run gives "
        "the output of an undisturbed one, with nothing left beside it.",
        "command": f"python benchmarks/kill_merge.py --what {options.what} --kills {options.kills} "
        f"--seed {options.seed}",
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / f"kill-{options.what}.json", document)
    return 0 if all(row[fault] == "0" for row in rows for fault in FAULTS) else 1


def lay(home: Path, **sizes: int) -> Path:
    """A base in shards, an adapter for it, and room for outputs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = write_tiny(home / "base", "llama", shard_size="5MB", pairs=[("t", "h")], **{**SIZES, **sizes})
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(home / "adapter")
    (home / "outputs").mkdir()
    return home


def kill_all(home: Path, count: int, seed: int, *, what: str = "merge") -> dict[str, str]:
    """End runs with SIGKILL, each at a random moment of its work."""
    whole_seconds = min(undisturbed(home, what) for _ in range(2))  # the first has to wait for files
    chance = random.Random(seed)
    moments = [chance.uniform(0, whole_seconds) for _ in range(count)]
    return tally("kill -9", home, what, [partial(run, home, what, moment=moment) for moment in moments])


def fill_all(home: Path, count: int, seed: int, *, what: str = "merge") -> dict[str, str]:
    """Let runs write files up to a random size only."""
    undisturbed(home, what)
    largest = max(file.stat().st_size for file in (home / "outputs" / "model").iterdir())
    chance = random.Random(seed)

    def limit(size: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    sizes = [chance.randrange(0, largest) for _ in range(count)]
    return tally("full disk", home, what, [partial(run, home, what, limit(size)) for size in sizes])


def undisturbed(home: Path, what: str) -> float:
    """The seconds of a run that nobody ends; its output stands there."""
    clear(home)
    started = time.perf_counter()
    assert run(home, what) == 0, f"{what} fails by itself"
    return time.perf_counter() - started


def tally(ended_by: str, home: Path, what: str, attempts: list[Callable[[], int]]) -> dict[str, str]:
    """Make each attempt, look at what it left, then run undisturbed; an undisturbed run's output stands there."""
    before, whole = inputs(home), output(home)
    clear(home)
    ended = left = 0
    faults = dict.fromkeys(FAULTS, 0)
    for attempt in attempts:
        ended += attempt() != 0
        faults["input damaged"] += inputs(home) != before
        left += any((home / "outputs").glob(f"{STAGING_PREFIX}*"))
        stands = (home / "outputs" / "model").exists()
        faults["half outputs"] += stands and output(home) != whole
        if stands and what != "merge":
            clear(home)  # an export refuses a folder in use; a merge knows its own
        faults["next run failed"] += run(home, what) != 0
        faults["next output differs"] += output(home) != whole
        faults["something left beside it"] += [*(home / "outputs").iterdir()] != [home / "outputs" / "model"]
        clear(home)
    counts = {"runs": len(attempts), "ended early": ended, "left something for the next": left, **faults}
    return {"what": what, "ended by": ended_by, **{key: str(count) for key, count in counts.items()}}


def run(home: Path, what: str, prepare: Callable[[], None] = lambda: None, *, moment: float | None = None) -> int:
    """Work in a forked process, so that no time goes into imports; ended after `moment` seconds. Its exit code."""
    for module in ("export", "merge", "verify"):
        import_module(f"peftkit.deploy.{module}")
    child = os.fork()
    if child == 0:
        code = BROKEN
        try:
            prepare()
            write(home, what)
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


def write(home: Path, what: str) -> None:
    """Merge the adapter; or export the base, for Ollama with the adapter beside it."""
    from peftkit.deploy import export as exporting
    from peftkit.deploy import merge as merging
    from peftkit.deploy.parity import PROMPTS, check_gguf
    from peftkit.deploy.verify import examine

    base, adapter, out = home / "base", home / "adapter", home / "outputs" / "model"
    # in this process, or with one prompt: what is asked of the models is no part of this
    merging.prove, exporting.check_gguf = examine, partial(check_gguf, prompts=PROMPTS[:1])
    if what == "merge":
        merging.merge(adapter, out, base=str(base))
    elif what == "ollama":
        exporting.export(adapter, "ollama", out, base=str(base))
    else:
        exporting.export(base, "gguf" if what == "gguf" else "onnx", out)


def inputs(home: Path) -> dict[str, str]:
    """Digests of everything that is read."""
    files = [file for name in ("base", "adapter") for file in sorted((home / name).rglob("*")) if file.is_file()]
    return {str(file): file_sha256(file) for file in files}


def output(home: Path) -> dict[str, str]:
    """Digests of everything that was written; of a report, which tells times, its status."""
    found = {}
    for file in sorted((home / "outputs" / "model").rglob("*")):
        if file.name in REPORTS:
            found[file.name] = str(json.loads(file.read_text(encoding="utf-8"))["status"])
        elif file.is_file():
            found[file.name] = file_sha256(file)
    return found


def clear(home: Path) -> None:
    """Take the outputs away."""
    shutil.rmtree(home / "outputs")
    (home / "outputs").mkdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

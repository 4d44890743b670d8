"""peftkit and a peer in turn, each in a fresh process: ratios of speed and memory with their spread, and both losses.

A round is one run of peftkit and one of each kind of peer asked for, one after the other, so that all meet the same
machine; peftkit's run and a peer's of one round are a pair. Rates leave out the first two steps; those of a job of
several epochs count them, for there peftkit fills its cache.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sides import Comparison, Ground, Sample, lay_ground, read_comparison, read_ground, train_with_peftkit

from peftkit.files import write_json
from peftkit.units import format_bytes

WARMUP_STEPS = 2
"""Steps left out of the rates: allocations and caches settle in them."""

RESULTS = Path(__file__).resolve().parent / "results"
PEERS = ("as-is", "tuned", "grouped")
TrainPeer = Callable[[Comparison, Ground, Path], Sample]


@dataclass(frozen=True, slots=True)
class Script:
    """What a benchmark script says about itself.

    Attributes:
        file: the script, which is started again for each stage.
        packages: whose versions the results name.
        jobs: the recipe sections in which each job differs from `base`.
        epochs: passes over the data, for jobs that make more than one.
        batch_size: examples of an optimizer step; like `steps`, a default of the command line.
        per_device: examples of one forward of each kind of peer, unless the command line says.
    """

    file: str
    doc: str
    packages: tuple[str, ...]
    base: Mapping[str, Any]
    jobs: Mapping[str, Mapping[str, Any]]
    epochs: Mapping[str, int]
    batch_size: int
    steps: int
    per_device: Mapping[str, int]
    train_peer: TrainPeer


@dataclass(frozen=True, slots=True)
class Measure:
    """One number of a run: how it is computed and shown."""

    title: str
    of: Callable[[Sample], float]
    show: Callable[[float], str]


def rate(counts: Sequence[int], seconds: Sequence[float], *, skip: int = WARMUP_STEPS) -> float:
    """Counts a second, the first `skip` steps left out."""
    return sum(counts[skip:]) / sum(seconds[skip:])


RATIOS: dict[str, Measure] = {
    "tokens_per_second": Measure("tokens/s", lambda s: rate(s.tokens, s.step_seconds), "{:.1f}".format),
    "tokens_per_cpu_second": Measure("tokens/CPU s", lambda s: rate(s.tokens, s.cpu_seconds), "{:.1f}".format),
    "samples_per_second": Measure("samples/s", lambda s: rate(s.samples, s.step_seconds), "{:.2f}".format),
    "all_steps_tokens_per_second": Measure(
        "tokens/s, first steps too", lambda s: rate(s.tokens, s.step_seconds, skip=0), "{:.1f}".format
    ),
    "all_steps_tokens_per_cpu_second": Measure(
        "tokens/CPU s, first steps too", lambda s: rate(s.tokens, s.cpu_seconds, skip=0), "{:.1f}".format
    ),
    "training_bytes": Measure("memory", lambda s: s.peak_bytes - s.baseline_bytes, format_bytes),
    "peak_bytes": Measure("memory with the model", lambda s: s.peak_bytes, format_bytes),
}
DIFFERENCES: dict[str, Measure] = {
    "first_loss": Measure("loss of step 1", lambda s: s.losses[0], "{:.5f}".format),
    "first_gradient_norm": Measure("gradient norm of step 1", lambda s: s.gradient_norms[0], "{:.5f}".format),
    "mean_loss": Measure("mean training loss", lambda s: statistics.fmean(s.losses), "{:.5f}".format),
    "validation_loss": Measure("validation loss", lambda s: s.validation_loss, "{:.5f}".format),
}


def main(script: Script, arguments: Sequence[str]) -> int:
    """Run a script's command line, or one of its stages."""
    if arguments and arguments[0] == "--stage":
        run_stage(script, arguments[1], Path(arguments[2]))
        return 0
    options = parse(script, arguments)
    comparisons = {peer: describe(script, options, peer) for peer in options.peer}
    rate_of = RATIOS[headline(comparisons[options.peer[0]])[0]].of
    with tempfile.TemporaryDirectory(prefix="peftkit-paired-") as scratch:
        folder = Path(scratch)
        environment = stage_environment(options.threads)
        write_json(folder / "comparison.json", asdict(comparisons[options.peer[0]]))
        launch(script.file, "ground", folder, environment)
        rounds = []
        for number in range(options.pairs):
            samples = {"peftkit": sample_of(script.file, "peftkit", folder, environment)}
            for peer, comparison in comparisons.items():
                write_json(folder / "comparison.json", asdict(comparison))
                samples[peer] = sample_of(script.file, "peer", folder, environment)
            rounds.append(samples)
            rates = (f"{side} {rate_of(sample):.1f}" for side, sample in samples.items())
            print(f"round {number + 1} of {options.pairs}, tokens/s: {', '.join(rates)}", flush=True)
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    for peer, comparison in comparisons.items():
        pairs = [{"peftkit": samples["peftkit"], "peer": samples[peer]} for samples in rounds]
        document = summarise(script, options, comparison, pairs, environment=found)
        show(document)
        named = [options.job, peer, *([options.dtype] if options.dtype else [])]
        path = options.out / document["title"] / f"{'-'.join(named)}.json"
        write_json(path, document)
        print(f"written to {path}")
    return 0


def parse(script: Script, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a comparison."""
    parser = argparse.ArgumentParser(description=script.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=list(script.jobs), required=True)
    parser.add_argument("--peer", choices=PEERS, nargs="+", required=True)
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side; published numbers have five or more")
    parser.add_argument("--steps", type=int, default=script.steps, help="optimizer steps of a run")
    parser.add_argument("--batch-size", type=int, default=script.batch_size, help="examples of an optimizer step")
    parser.add_argument("--per-device", type=int, help="examples of one forward of the peer")
    parser.add_argument("--validation", type=int, default=64, help="validation examples, scored at the end")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the machine's fastest")
    parser.add_argument("--dropout", type=float, help="of the backbone's layers; default: what its configuration says")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.steps <= WARMUP_STEPS:
        parser.error(f"--steps needs more than the {WARMUP_STEPS} that are left out")
    given = {name: value for name, value in vars(options).items() if value != parser.get_default(name)}
    given["peer"] = " ".join(options.peer)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in given.items() if name != "out"]
    options.command = " ".join([f"python benchmarks/{Path(script.file).name}", *words])
    return options


def describe(script: Script, options: argparse.Namespace, peer: str) -> Comparison:
    """The comparison with one kind of peer that the options ask for; steps are rounded up to whole epochs."""
    from peftkit.recipe import Training

    epochs = script.epochs.get(options.job, 1)
    steps_per_epoch = -(-options.steps // epochs)
    job = script.jobs[options.job]
    recipe: dict[str, Any] = {name: dict(section) for name, section in script.base.items()}
    for name, section in job.items():
        recipe[name] = dict(section) if "kind" in section else recipe[name] | section
    recipe["backbone"]["dtype"] = options.dtype or fastest_dtype()
    recipe["data"]["limit"] = {"train": steps_per_epoch * options.batch_size, "validation": options.validation}
    training = recipe["training"] | {
        "epochs": epochs,
        "batch_size": options.batch_size,
        "dropout": options.dropout,
        "log_every": 1,
        "checkpoint_every": 10**6,
    }
    defaults = Training()
    fixed = {"betas": list(defaults.betas), "weight_decay": defaults.weight_decay, "clip": defaults.clip}
    recipe |= {"training": fixed | training, "evaluation": {"every": "never"}, "seed": options.seed}
    return Comparison(recipe, options.job, peer, options.per_device or script.per_device[peer])


def fastest_dtype() -> str:
    """What peftkit computes in by default on this machine."""
    import torch

    from peftkit.backbones.load import compute_dtype
    from peftkit.backbones.spec import BackboneSpec

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return str(compute_dtype(BackboneSpec(name="any"), device)).removeprefix("torch.")


def stage_environment(threads: int) -> dict[str, str]:
    """The environment of the stages, the same for both sides: how threads wait, and nothing asks the hub."""
    from peftkit.threads import settle

    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment = os.environ | wanted | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settle(environment)
    return environment


def launch(file: str, stage: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Run one stage of a script in a fresh process; its output goes to a file, whose end is shown when it fails."""
    log = folder / f"{stage}.log"
    with log.open("w", encoding="utf-8") as stream:
        command = [sys.executable, file, "--stage", stage, str(folder)]
        done = subprocess.run(command, env=dict(environment), stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])
        sys.exit(f"{tail}\nstage {stage} ended with {done.returncode}")


def sample_of(file: str, side: str, folder: Path, environment: Mapping[str, str]) -> Sample:
    """One run of one side, with a cache of its own for what a run may leave behind for the next."""
    from peftkit.cache import home

    with tempfile.TemporaryDirectory(prefix="peftkit-home-") as scratch:
        for name in ("backbones", "datasets", "packages"):
            if (home() / name).is_dir():
                (Path(scratch) / name).symlink_to((home() / name).absolute())
        shutil.rmtree(folder / "peftkit", ignore_errors=True)
        launch(file, side, folder, {**environment, "PEFTKIT_HOME": scratch})
    return Sample(**json.loads((folder / f"{side}.json").read_text(encoding="utf-8")))


def run_stage(script: Script, stage: str, folder: Path) -> None:
    """What a fresh process does."""
    if stage == "ground":
        write_ground(folder)
    elif stage == "peftkit":
        write_json(folder / "peftkit.json", asdict(train_with_peftkit(folder)))
    else:
        sample = script.train_peer(read_comparison(folder), read_ground(folder), folder)
        write_json(folder / "peer.json", asdict(sample))


def write_ground(folder: Path) -> None:
    """The stage before the runs: what both sides start from, and the machine they run on."""
    from peftkit.environment import describe_environment

    lay_ground(folder)
    write_json(folder / "environment.json", describe_environment())


def summarise(
    script: Script,
    options: argparse.Namespace,
    comparison: Comparison,
    pairs: Sequence[Mapping[str, Sample]],
    *,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, medians and spreads first, as one JSON document."""
    ratios = {name: ratio(measure, pairs) for name, measure in RATIOS.items()}
    differences = {name: difference(measure, pairs) for name, measure in DIFFERENCES.items()}
    versions = {name: metadata.version(name) for name in script.packages}
    return {
        "title": Path(script.file).stem.replace("_", "-"),
        "command": options.command,
        "note": "Medians over pairs of runs; ratios are peftkit's value over the peer's in one pair, with their least "
        "and greatest. Memory is the peak above the loaded model. Losses are peftkit's and, in brackets, how far they "
        "are from the peer's.",
        "rows": [as_row(options, comparison, ratios, differences)],
        "peer": {"kind": comparison.peer, "per_device": comparison.per_device, **versions},
        "pairs": options.pairs,
        "steps": len(pairs[0]["peftkit"].losses),
        "recipe": comparison.recipe,
        "environment": {**environment, "packages": environment["packages"] | versions},
        "ratios": ratios,
        "differences": differences,
        "samples": [{side: asdict(sample) for side, sample in pair.items()} for pair in pairs],
    }


def as_row(
    options: argparse.Namespace,
    comparison: Comparison,
    ratios: Mapping[str, Mapping[str, float]],
    differences: Mapping[str, Mapping[str, float]],
) -> dict[str, str]:
    """The comparison as one row of the published table."""

    def spread(name: str) -> str:
        found = ratios[name]
        return f"{found['median']:.2f} [{found['min']:.2f}, {found['max']:.2f}]"

    def loss(name: str) -> str:
        found = differences[name]
        return f"{found['peftkit']:.4f} ({found['peftkit'] / found['peer'] - 1:+.2%})"

    counted, cpu_counted = headline(comparison)
    speed, memory = RATIOS[counted], RATIOS["training_bytes"]
    speeds, memories = ratios[counted], ratios["training_bytes"]
    return {
        "job": f"{options.job}, {comparison.dtype}",
        "peer": comparison.peer,
        "pairs": str(options.pairs),
        "tokens/s": speed.show(speeds["peftkit"]),
        "peer's": speed.show(speeds["peer"]),
        "ratio": spread(counted),
        "ratio by CPU time": spread(cpu_counted),
        "memory": memory.show(memories["peftkit"]),
        "peer's memory": memory.show(memories["peer"]),
        "memory ratio": spread("training_bytes"),
        "training loss": loss("mean_loss"),
        "validation loss": loss("validation_loss"),
    }


def headline(comparison: Comparison) -> tuple[str, str]:
    """The names of the rates that a comparison is judged by, in wall and in CPU time."""
    names = ("tokens_per_second", "tokens_per_cpu_second")
    return names if comparison.training["epochs"] == 1 else (f"all_steps_{names[0]}", f"all_steps_{names[1]}")


def ratio(measure: Measure, pairs: Sequence[Mapping[str, Sample]]) -> dict[str, float]:
    """Medians of both sides, and the spread over pairs of peftkit's value as a multiple of the peer's."""
    quotients = [measure.of(pair["peftkit"]) / measure.of(pair["peer"]) for pair in pairs]
    return medians(measure, pairs) | {
        "min": min(quotients),
        "median": statistics.median(quotients),
        "max": max(quotients),
    }


def difference(measure: Measure, pairs: Sequence[Mapping[str, Sample]]) -> dict[str, float]:
    """Medians of both sides, and the largest distance of a pair, as it is and as a fraction of the peer's value."""
    distances = [(measure.of(pair["peftkit"]) - measure.of(pair["peer"]), measure.of(pair["peer"])) for pair in pairs]
    return medians(measure, pairs) | {
        "largest": max((distance for distance, _ in distances), key=abs),
        "largest_fraction": max(abs(distance / value) for distance, value in distances),
    }


def medians(measure: Measure, pairs: Sequence[Mapping[str, Sample]]) -> dict[str, float]:
    """The median of each side."""
    return {side: statistics.median(measure.of(pair[side]) for pair in pairs) for side in ("peftkit", "peer")}


def show(document: Mapping[str, Any]) -> None:
    """Every measure of the document as a table on the terminal."""
    rows = []
    for name, measure in RATIOS.items():
        found = document["ratios"][name]
        sides = {side: measure.show(found[side]) for side in ("peftkit", "peer")}
        spread = f"{found['min']:.2f} to {found['max']:.2f}"
        rows.append({"": measure.title, **sides, "ratio": f"{found['median']:.2f}", "min to max": spread})
    for name, measure in DIFFERENCES.items():
        found = document["differences"][name]
        sides = {side: measure.show(found[side]) for side in ("peftkit", "peer")}
        off = f"{found['largest']:+.1e} ({found['largest_fraction']:.2%})"
        rows.append({"": measure.title, **sides, "ratio": "", "min to max": off})
    versions = ", ".join(f"{name} {value}" for name, value in document["peer"].items())
    print_table(rows, f"{document['rows'][0]['job']}; peer: {versions}. {document['note']}")


def print_table(rows: Sequence[Mapping[str, str]], note: str) -> None:
    """Rows of equal keys on the terminal, the first column to the left, and a note below them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=note, caption_justify="left")
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)

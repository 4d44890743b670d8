"""Where a training step's time goes, and what part of the machine's peak it uses.

`python benchmarks/step_profile.py recipes/chat-lora.yaml training.batch_size=8` profiles steps of the recipe;
`--ablate` runs it with each fast path off in turn instead, all variants in each round.

`attribution.py` says which operator counts where, `flops.py` what counts as work. Utilisation is the work of a step
over its time, without the profiler, and over the peak: the best median rate of a matrix product in the same process
and dtype, square ones and the model's own sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution import Sizes, group_of
from flops import gemm_peak, model_flops
from paired import RATIOS, RESULTS, WARMUP_STEPS, launch, print_table, sample_of, stage_environment, write_ground
from sides import ClockObserver, Comparison, Sample, read_comparison, read_ground, train_with_peftkit

from peftkit.files import write_json
from peftkit.onednn import CAPACITIES
from peftkit.recipe import Recipe, build_recipe, load_recipe

if TYPE_CHECKING:
    from peftkit.train.loop import StepReport

KERNELS = ("packing", "attention", "loss", "lora", "layers")
VARIANTS: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {
    "all on": ((), {}),
    **{f"{name} off": ((name,), {}) for name in KERNELS},
    "all off": (KERNELS, {}),
    "every product kept": ((), dict.fromkeys(CAPACITIES, "1024")),
}
"""Fast paths that are turned off, and changes to the environment, by what the table calls them."""
SETTLING_STEPS = 1
"""Steps between the timed and the profiled ones, in which the profiler starts."""


class ProfilingObserver(ClockObserver):
    """A run's clock that profiles the last `profiled` steps of the run."""

    def __init__(self, profiled: int) -> None:
        from torch.profiler import profile, schedule

        super().__init__()
        self.profiled = profiled
        plan = schedule(wait=0, warmup=SETTLING_STEPS, active=profiled, repeat=1)
        self.profiler = profile(schedule=plan, record_shapes=True)

    def on_step(self, report: StepReport) -> None:
        super().on_step(report)
        into = report.step - (report.total_steps - self.profiled - SETTLING_STEPS)
        if into == 0:
            self.profiler.start()
        if into > 0:
            self.profiler.step()
        if report.step == report.total_steps:
            self.profiler.stop()


def main(arguments: Sequence[str]) -> int:
    """Profile or ablate a recipe, or run one of the stages."""
    if arguments and arguments[0] == "--stage":
        run_stage(arguments[1], Path(arguments[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key.sub=value")
    parser.add_argument("--steps", type=int, default=8, help=f"steps that are timed, after {WARMUP_STEPS} that are not")
    parser.add_argument("--profiled", type=int, default=3, help="steps that are profiled after them")
    parser.add_argument("--ablate", action="store_true", help="turn each fast path off instead")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of --ablate")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    with tempfile.TemporaryDirectory(prefix="peftkit-profile-") as scratch:
        document = (ablated if options.ablate else profiled)(options, recipe, Path(scratch))
    print_table(document["rows"], document["note"])
    title = "ablation" if options.ablate else "step-profile"
    words = [str(options.recipe), *options.overrides, "--steps", str(options.steps), "--threads", str(options.threads)]
    words += ["--ablate", "--pairs", str(options.pairs)] if options.ablate else ["--profiled", str(options.profiled)]
    command = f"python benchmarks/{Path(__file__).name} {' '.join(words)}"
    path = options.out / title / f"{options.recipe.stem}.json"
    write_json(path, {"title": title, "command": command, **document})
    print(f"written to {path}")
    return 0


def run_stage(stage: str, folder: Path) -> None:
    """What a fresh process does."""
    if stage == "ground":
        write_ground(folder)
    elif stage == "peftkit":
        write_json(folder / "peftkit.json", asdict(train_with_peftkit(folder)))
    else:
        write_json(folder / "profile.json", profile_run(folder))


def profiled(options: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The profile of a recipe's step as a document."""
    steps = WARMUP_STEPS + options.steps + SETTLING_STEPS + options.profiled
    comparison = Comparison(settled(recipe, steps=steps), "profile", str(options.profiled), 1)
    write_json(folder / "comparison.json", asdict(comparison))
    environment = stage_environment(options.threads)
    for stage in ("ground", "profile"):
        launch(__file__, stage, folder, environment)
    found: dict[str, Any] = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    total = sum(found["groups"].values())
    rows = [
        {"part of the step": group, "ms": f"{1000 * seconds:.1f}", "share": f"{seconds / total:.1%}"}
        | {"mostly": ", ".join(name.removeprefix("aten::") for name in list(found["operators"][group])[:3])}
        for group, seconds in found["groups"].items()
    ]
    note = (
        f"{options.recipe.stem} in {found['dtype']}: a step takes {found['step_seconds']:.3f} s, "
        f"{found['profiled_step_seconds']:.3f} s while profiled. {found['model_flops'] / 1e9:.1f} model GFLOPs a step "
        f"are {found['utilization']:.1%} of the peak of {found['peak_flops']['best'] / 1e9:.1f} GFLOP/s."
    )
    return {"note": note, "rows": rows, "recipe": comparison.recipe, **found, **environment_of(folder)}


def profile_run(folder: Path) -> dict[str, Any]:
    """Train the comparison's recipe under the clock, then under the profiler, and measure the peak beside it."""
    import torch

    import peftkit
    from peftkit.backbones.load import compute_dtype, dims_of
    from peftkit.data.load import load_splits
    from peftkit.tasks import SHAPES, read_head

    comparison = read_comparison(folder)
    recipe, count = build_recipe(comparison.recipe), int(comparison.peer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = read_head(recipe.task, load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed).train)
    dims, dtype = dims_of(recipe.backbone, head), compute_dtype(recipe.backbone, device)
    observer = ProfilingObserver(count)
    peftkit.train(recipe, folder / "run", planned=False, observer=observer)
    peak = gemm_peak(dims, dtype, device)
    operators: dict[str, Counter[str]] = {}
    sizes = Sizes.of(recipe.method, dims)
    events: Any = observer.profiler.events()  # type: ignore[no-untyped-call]
    for event in events:
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if event.device_type.name == "CPU":
            operators.setdefault(group_of(event, sizes), Counter())[event.name] += own / 1e6 / count
    groups = {group: names.total() for group, names in operators.items()}
    timed = slice(WARMUP_STEPS, -count - SETTLING_STEPS)
    flops = [model_flops(recipe.method, dims, step) for step in read_ground(folder).steps[timed]]
    clock = observer.clock
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "step_seconds": statistics.median(clock.wall[timed]),
        "cpu_seconds": statistics.median(clock.cpu[timed]),
        "profiled_step_seconds": statistics.median(clock.wall[-count:]),
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "operators": {group: dict(names.most_common(8)) for group, names in operators.items()},
        "model_flops": statistics.fmean(flops),
        "peak_flops": peak,
        "utilization": sum(flops) / sum(clock.wall[timed]) / peak["best"],
    }


def ablated(options: argparse.Namespace, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe with all fast paths, without each, and without any, as a document."""
    environment = stage_environment(options.threads)
    runs: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
    for number in range(options.pairs):
        for name, (absent, changes) in VARIANTS.items():
            content = settled(recipe, steps=WARMUP_STEPS + options.steps)
            content["training"]["kernels"] |= dict.fromkeys(absent, False)
            write_json(folder / "comparison.json", asdict(Comparison(content, name, "none", 1)))
            if not (folder / "ground.json").exists():
                launch(__file__, "ground", folder, environment)
            runs[name].append(sample_of(__file__, "peftkit", folder, {**environment, **changes}))
            print(f"round {number + 1} of {options.pairs}: {name}", flush=True)
    rows = [ablation_row(name, samples, runs["all on"]) for name, samples in runs.items()]
    note = f"{options.recipe.stem}: medians of {options.pairs} rounds; memory is the peak above the loaded model."
    kept = {name: [asdict(sample) for sample in samples] for name, samples in runs.items()}
    return {"note": note, "rows": rows, "recipe": recipe.to_dict(), "samples": kept, **environment_of(folder)}


def ablation_row(name: str, samples: Sequence[Sample], whole: Sequence[Sample]) -> dict[str, str]:
    """One variant against the run with all fast paths of the same round."""
    speed, memory = RATIOS["tokens_per_second"], RATIOS["training_bytes"]
    ratios = [speed.of(mine) / speed.of(theirs) for mine, theirs in zip(samples, whole, strict=True)]
    return {
        "fast paths": name,
        "tokens/s": speed.show(statistics.median(map(speed.of, samples))),
        "over all on": f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
        "CPU s a step": f"{statistics.median(statistics.fmean(s.cpu_seconds[WARMUP_STEPS:]) for s in samples):.3f}",
        "memory": memory.show(statistics.median(map(memory.of, samples))),
        "mean loss": f"{statistics.fmean(samples[0].losses):.5f}",
    }


def settled(recipe: Recipe, *, steps: int) -> dict[str, Any]:
    """The recipe as plain data, for `steps` steps with a line of the log each and nothing between them."""
    content = recipe.to_dict()
    training = content["training"] | {"max_steps": steps, "log_every": 1, "checkpoint_every": 10**6}
    limit = content["data"]["limit"] | {"validation": 16}
    limit["train"] = limit["train"] or steps * training["batch_size"]
    data = content["data"] | {"validation": content["data"]["validation"] or 0.1, "test": None, "limit": limit}
    return {**content, "training": training, "data": data, "evaluation": {"every": "never"}}


def environment_of(folder: Path) -> Mapping[str, Any]:
    """What the ground's process saw of the machine."""
    return {"environment": json.loads((folder / "environment.json").read_text(encoding="utf-8"))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the fresh processes of a comparison do: lay the common ground, train with peftkit, train with a peer.

Both sides start from the same weights, take the same examples in the same order in every optimizer step (peftkit's,
from `step_order`), the same labels, the same learning rate at each step, and the same clock and memory meter.
A step lasts from the end of the step before it to its own end, so that batching, logging and the like count.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.files import write_json

if TYPE_CHECKING:
    import torch

    from peftkit.data.features import Features
    from peftkit.tasks.base import Score
    from peftkit.train.loop import StepReport

Example = dict[str, Any]
"""`input_ids` [T], `labels` ([T] with -100 where no loss is, or a class index), and `token_type_ids` [T] where used."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What both sides are told.

    Attributes:
        recipe: peftkit's recipe as plain data.
        job: the method to train with, a name of the script's own table.
        peer: `as-is`, `tuned` or `grouped`.
        per_device: examples of one forward of the peer; the rest of an optimizer step is accumulated.
    """

    recipe: dict[str, Any]
    job: str
    peer: str
    per_device: int

    @property
    def training(self) -> dict[str, Any]:
        """The recipe's training section."""
        section: dict[str, Any] = self.recipe["training"]
        return section

    @property
    def dtype(self) -> str:
        """The dtype that peftkit computes in, and a peer that is not left as it is."""
        return str(self.recipe["backbone"]["dtype"])


@dataclass(frozen=True, slots=True)
class Ground:
    """What both sides start from.

    Attributes:
        model: folder of the backbone's weights; of the whole initial model where all of it trains.
        adapter: folder of the initial adapter, new heads included; None where all weights train.
        tokenizer: folder.
        steps: the examples of each optimizer step, in peftkit's order.
        rates: the learning rate of each step.
    """

    model: str
    adapter: str | None
    tokenizer: str
    steps: list[list[Example]]
    validation: list[Example]
    rates: list[float]

    def cut(self, comparison: Comparison) -> list[Example]:
        """All examples as the peer takes them, one after the other; `grouped` orders each step by length."""
        longest_first = comparison.peer == "grouped"
        return [
            example
            for step in self.steps
            for example in (sorted(step, key=lambda e: -len(e["input_ids"])) if longest_first else step)
        ]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. Lists have one entry a step; the first step lasts from the loaded model to its end."""

    step_seconds: list[float]
    cpu_seconds: list[float]
    tokens: list[int]
    samples: list[int]
    losses: list[float]
    gradient_norms: list[float]
    validation_loss: float
    baseline_bytes: int
    peak_bytes: int


class Clock:
    """Wall and CPU seconds of each step, from the end of the one before."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.start()

    def start(self) -> None:
        """The first step begins here."""
        self._last = (time.perf_counter(), time.process_time())

    def tick(self) -> None:
        """A step ends here."""
        now = (time.perf_counter(), time.process_time())
        self.wall.append(now[0] - self._last[0])
        self.cpu.append(now[1] - self._last[1])
        self._last = now


class ClockObserver:
    """Watches a run of peftkit with the clock. Loading is over, and the first step begins, with the last message
    before it; but running the frozen layers for the activation cache is part of that step."""

    def __init__(self) -> None:
        self.clock = Clock()
        self._caching = False

    def on_step(self, report: StepReport) -> None:
        self.clock.tick()

    def on_validation(self, step: int, loss: float, metrics: dict[str, Score]) -> None:
        """Nothing is timed there."""

    def say(self, text: str) -> None:
        print(text, flush=True)
        self._caching = self._caching or text.startswith("activation cache")
        if not self.clock.wall and not self._caching:
            self.clock.start()


def lay_ground(folder: Path) -> None:
    """Write `ground.json` and the initial weights: what peftkit itself encodes, orders and initialises."""
    from accelerate import Accelerator

    from peftkit.backbones.load import resolve
    from peftkit.data.batching import step_order
    from peftkit.prepare import prepare
    from peftkit.recipe import build_recipe
    from peftkit.train.optimizers import learning_rate

    recipe = build_recipe(read_comparison(folder).recipe)
    prepared = prepare(recipe, ClockObserver(), device=Accelerator().device)
    initial = folder / "initial"
    prepared.adapted.save(initial)

    def encoded(table: Any) -> list[Features]:
        backbone, limit = prepared.backbone, recipe.training.max_tokens
        found = prepared.task.encode(table, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=limit)
        return list(found.features)

    features, size = encoded(prepared.splits.train), recipe.training.batch_size
    total = recipe.training.max_steps or math.ceil(recipe.training.epochs * len(features) / size)
    epochs = math.ceil(total * size / len(features))
    order = [step for epoch in range(epochs) for step in step_order(len(features), size, seed=recipe.seed, epoch=epoch)]
    assert prepared.splits.validation is not None, "a comparison scores a validation split"
    base = resolve(recipe.backbone)
    ground = Ground(
        model=str(initial) if prepared.adapted.artifact == "model" else base,
        adapter=str(initial) if prepared.adapted.artifact == "adapter" else None,
        tokenizer=base,
        steps=[[as_example(features[index]) for index in step] for step in order[:total]],
        validation=[as_example(feature) for feature in encoded(prepared.splits.validation)],
        rates=[learning_rate(recipe.training, step, total) for step in range(total)],
    )
    write_json(folder / "ground.json", asdict(ground))


def as_example(features: Features) -> Example:
    """Features as transformers takes them."""
    target: Any = features.target
    example = {
        "input_ids": features.input_ids.tolist(),
        "labels": target if isinstance(target, int) else target.tolist(),
    }
    if features.token_type_ids is not None:
        example["token_type_ids"] = features.token_type_ids.tolist()
    return example


def train_with_peftkit(folder: Path) -> Sample:
    """Train the comparison's recipe through the public API, as a user would, but without a plan.

    With one, two steps of a run count their tensors one by one, which takes half as long again as the step itself: next
    to nothing of a run, and a tenth of the few steps that are compared here.
    """
    import peftkit
    from peftkit.recipe import build_recipe

    recipe = build_recipe(read_comparison(folder).recipe)
    observer, out = ClockObserver(), folder / "peftkit"
    record = peftkit.train(recipe, out, planned=False, observer=observer)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = read_ground(folder).steps
    tokens, samples = sizes(steps)
    assert record.memory is not None
    assert record.throughput is not None
    assert record.loss is not None
    assert record.throughput.tokens == sum(tokens), "peftkit did not train on the ground's examples"
    return Sample(
        step_seconds=observer.clock.wall,
        cpu_seconds=observer.clock.cpu,
        tokens=tokens,
        samples=samples,
        losses=[row["loss"] for row in rows],
        gradient_norms=[row["gradient_norm"] for row in rows],
        validation_loss=_measured(record.loss.validation),
        baseline_bytes=_measured(record.memory.baseline_bytes),
        peak_bytes=_measured(record.memory.peak_bytes),
    )


def shared_arguments(comparison: Comparison, ground: Ground, folder: Path) -> dict[str, Any]:
    """The settings of `TrainingArguments` that are the recipe's, whatever the peer; the rest stays at its defaults."""
    import torch

    training = comparison.training
    accumulated, left = divmod(training["batch_size"], comparison.per_device)
    assert left == 0, f"--per-device {comparison.per_device} does not divide a step of {training['batch_size']}"
    assert {len(step) for step in ground.steps} == {training["batch_size"]}, "the data is too short for so many steps"
    return {
        "output_dir": str(folder / "peer"),
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": comparison.per_device,
        "gradient_accumulation_steps": accumulated,
        "max_steps": len(ground.steps),
        "train_sampling_strategy": "sequential",
        "learning_rate": training["learning_rate"],
        "adam_beta1": training["betas"][0],
        "adam_beta2": training["betas"][1],
        "weight_decay": training["weight_decay"],
        "max_grad_norm": training["clip"],
        "seed": comparison.recipe["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_with_trainer(trainer: Any, ground: Ground) -> Sample:
    """Train a transformers `Trainer` that is ready but for its schedule and its initial adapter."""
    import torch
    from transformers.trainer_callback import PrinterCallback, TrainerCallback

    from peftkit.train.meter import Meter, make_resident

    meter, clock = Meter(trainer.args.device), Clock()

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Gives each step to the clock and to peftkit's own memory meter."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.step = meter.step()
            self.step.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.step.__exit__(None, None, None)
            clock.tick()

    load_adapter(trainer.model, ground)
    trainer.create_optimizer()
    last, peak = len(ground.rates) - 1, trainer.args.learning_rate
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: ground.rates[min(step, last)] / peak
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    make_resident(trainer.model)
    clock.start()
    trainer.train()
    logged = [row for row in trainer.state.log_history if "grad_norm" in row]
    tokens, samples = sizes(ground.steps)
    memory = meter.memory()
    return Sample(
        step_seconds=clock.wall,
        cpu_seconds=clock.cpu,
        tokens=tokens,
        samples=samples,
        losses=[row["loss"] for row in logged],
        gradient_norms=[row["grad_norm"] for row in logged],
        validation_loss=mean_loss(trainer.model, ground.validation),
        baseline_bytes=_measured(memory.baseline_bytes),
        peak_bytes=_measured(memory.peak_bytes),
    )


def initial_config(ground: Ground) -> Any:
    """The PEFT configuration of the initial adapter, for training; None where all weights train."""
    from peft import PeftConfig

    if ground.adapter is None:
        return None
    config = PeftConfig.from_pretrained(ground.adapter)
    config.inference_mode = False
    return config


def load_adapter(model: Any, ground: Ground) -> None:
    """Give the peer's fresh adapter the initial values of peftkit's."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if ground.adapter is not None:
        found = set_peft_model_state_dict(model, load_file(Path(ground.adapter) / "adapter_model.safetensors"))
        assert not found.unexpected_keys, f"the peer's adapter lacks {found.unexpected_keys[:3]}"


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean loss over labelled tokens (or over sequences) in nats, in eight examples a forward of like lengths."""
    import torch
    from torch.nn import functional

    model.eval()
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
    total, units = 0.0, 0
    for start in range(0, len(ordered), 8):
        batch = {name: tensor.to(device) for name, tensor in padded(ordered[start : start + 8]).items()}
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits.float()
        if labels.ndim == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total += float(functional.cross_entropy(logits, labels, reduction="sum"))
        units += int((labels != -100).sum())
    return total / units


def padded(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Right-padded tensors with their mask. Whatever stands at padding is masked."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def stacked(name: str, fill: int) -> torch.Tensor:
        rows = [torch.tensor(example[name]) for example in examples]
        return torch.stack(rows) if rows[0].ndim == 0 else pad_sequence(rows, batch_first=True, padding_value=fill)

    fills = {"input_ids": 0, "labels": -100, "token_type_ids": 0}
    batch = {name: stacked(name, fill) for name, fill in fills.items() if name in examples[0]}
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def sizes(steps: Sequence[Sequence[Example]]) -> tuple[list[int], list[int]]:
    """Tokens without padding, and examples, of each step."""
    return [sum(len(e["input_ids"]) for e in step) for step in steps], [len(step) for step in steps]


def read_comparison(folder: Path) -> Comparison:
    """What the driver wrote for its stages."""
    return Comparison(**json.loads((folder / "comparison.json").read_text(encoding="utf-8")))


def read_ground(folder: Path) -> Ground:
    """What `lay_ground` wrote."""
    return Ground(**json.loads((folder / "ground.json").read_text(encoding="utf-8")))


def _measured(value: Any) -> Any:
    assert value is not None, "this machine does not measure what the comparison compares"
    return value

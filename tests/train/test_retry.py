"""Out of memory: the step is taken in smaller forwards, and is otherwise the step it would have been."""

from __future__ import annotations

import json
import math
import random
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftkit import run
from peftkit.data.batching import Batch
from peftkit.errors import OutOfMemory
from peftkit.record import RunRecord
from peftkit.tasks.chat import ChatTask
from peftkit.train import gradients
from peftkit.train.optimizers import AfterBackward
from peftkit.train.progress import PlainObserver
from peftkit.train.retry import Exhausted, MicroBatch, attempt, is_out_of_memory

STEADY = ("training.warmup=0", "training.schedule=constant", "training.learning_rate=1e-2")
UNSCORED = (*STEADY, "evaluation.every=never", "data.validation=null", "data.test=null")
train = partial(run.train, planned=False)  # a plan has forwards of its own, which are not to be counted
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Device:
    """A device with memory for some forwards only; it counts those that are tried.

    Args:
        where: what runs out: the `forward`, the first of the `backward`, or its part below the first `layer`.
        first_forward: the first forward that may find too little.
        draws: each forward takes a number from every generator.
    """

    def __init__(
        self,
        fits: Callable[[Batch], bool],
        *,
        where: str = "forward",
        first_forward: int = 1,
        fault: type[BaseException] = torch.OutOfMemoryError,
        draws: bool = False,
    ) -> None:
        self.fits, self.where, self.first_forward, self.fault, self.drawing = fits, where, first_forward, fault, draws
        self.forwards: list[int] = []
        self.tokens: list[int] = []
        self.draws: list[tuple[float, float, float]] = []
        self.losses: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Device:
        plain = ChatTask.loss

        def loss(task: ChatTask, model: nn.Module, batch: Batch, **settings: Any) -> Tensor:
            self.forwards.append(len(batch.rows))
            self.tokens.append(batch.input_ids.numel())
            if self.drawing:
                self.draws.append((random.random(), float(np.random.random()), float(torch.rand(()))))
            self.alive.append(sum(known() is not None for known in self.losses))
            full = len(self.forwards) >= self.first_forward and not self.fits(batch)
            if not (full and self.where == "layer"):
                found = plain(task, model, batch, **settings)
            else:
                handle = _layers(model)[0].register_forward_hook(
                    lambda module, args, hidden: hidden.register_hook(self.fail) and None
                )
                found = plain(task, model, batch, **settings)
                handle.remove()
            self.losses.append(weakref.ref(found))
            if full and self.where == "forward":
                self.fail()
            if full and self.where == "backward":
                found.register_hook(self.fail)
            return found

        monkeypatch.setattr(ChatTask, "loss", loss)
        return self

    def fail(self, *_: Any) -> None:
        raise self.fault(FULL)


class Listener(PlainObserver):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def _layers(model: nn.Module) -> nn.ModuleList:
    return next(
        module
        for name, module in model.named_modules()
        if name.endswith(".layers") and isinstance(module, nn.ModuleList)
    )


def trained(folder: Path) -> dict[str, Tensor]:
    files = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(files[0])


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(one: Path, other: Path) -> None:
    left, right = trained(one), trained(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def smaller(record: RunRecord) -> str:
    return f"training.micro_batch={record.guards['oom_retries'][-1]['to']}"


def at_most(examples: int) -> Callable[[Batch], bool]:
    return lambda batch: len(batch.rows) <= examples


@pytest.mark.parametrize(
    ("where", "method", "settings"),
    [
        ("forward", "lora", ()),
        ("backward", "prefix", ()),
        ("layer", "full", ("training.dropout=0.1",)),
        ("forward", "full", ("training.optimizer_in_backward=true", "training.clip=null")),
        ("layer", "lora", ("training.kernels.packing=false", "training.checkpointing=all")),
    ],
)
def test_a_retried_run_is_one_that_had_the_smaller_micro_batch_from_the_start(
    where: str, method: str, settings: tuple[str, ...], chat_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    overrides = (*UNSCORED, "training.max_steps=3", "training.log_every=1", *settings)
    observer = Listener()
    with monkeypatch.context() as patch:
        Device(at_most(2), where=where).install(patch)
        recipe = chat_recipe("training.micro_batch=8", *overrides, method=method)
        retried = train(recipe, tmp_path / "retried", observer=observer)
    assert retried.guards["oom_retries"] == [{"step": 1, "from": 8, "to": 2}]  # 8, 4, 2
    assert len([line for line in observer.lines if "ran out of memory" in line]) == 1
    straight = train(chat_recipe(smaller(retried), *overrides, method=method), tmp_path / "straight")
    assert "oom_retries" not in straight.guards
    assert_same_bits(tmp_path / "retried", tmp_path / "straight")
    assert losses(tmp_path / "retried") == losses(tmp_path / "straight")
    assert retried.throughput is not None
    assert straight.throughput is not None
    for name in ("samples", "tokens", "loss_tokens", "padding_fraction"):  # failed attempts count for nothing
        assert getattr(retried.throughput, name) == getattr(straight.throughput, name)


def test_auto_is_halved_from_what_a_forward_held(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    # All eight conversations are one forward, far below the budget of `auto`: half of that budget would be no change.
    device = Device(at_most(7)).install(monkeypatch)
    record = train(chat_recipe(*UNSCORED, "training.max_steps=1"), tmp_path / "run")
    half = math.ceil(device.tokens[0] / 2)
    assert record.guards["oom_retries"] == [{"step": 1, "from": "2048 tokens", "to": f"{half} tokens"}]
    assert device.forwards[0] == 8
    assert sum(device.forwards[1:]) == 8
    assert max(device.tokens[1:]) <= half


def test_a_step_in_the_middle_is_the_same_step_in_more_forwards(
    chat_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    overrides = (*UNSCORED, "training.max_steps=4", "training.micro_batch=8", "training.log_every=1")
    train(chat_recipe(*overrides), tmp_path / "whole")
    device = Device(at_most(4), first_forward=3).install(monkeypatch)
    record = train(chat_recipe(*overrides), tmp_path / "retried")
    assert record.guards["oom_retries"] == [{"step": 3, "from": 8, "to": 4}]
    assert device.forwards == [8, 8, 8, 4, 4, 4, 4]  # and no failure at the fourth step
    # The same sums in another order, in float32: a few rounding errors of 6e-8 each, which three updates carry on.
    assert losses(tmp_path / "retried") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert losses(tmp_path / "whole")[0] > 1.01 * losses(tmp_path / "whole")[-1]  # there is a curve to follow


def test_a_retry_starts_from_the_random_numbers_of_the_step(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    device = Device(at_most(2), first_forward=2, draws=True).install(monkeypatch)
    train(chat_recipe(*UNSCORED, "training.max_steps=1", "training.micro_batch=4"), tmp_path / "run")
    assert device.forwards == [4, 4, 2, 2, 2, 2]
    assert device.draws[2] == device.draws[0]  # of the step's start, and not of the forward that failed
    assert device.draws[3] == device.draws[1]


def test_nothing_of_a_failed_attempt_is_alive_when_the_next_begins(
    chat_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    cleared: list[bool] = []
    monkeypatch.setattr(gradients, "clear_device_cache", lambda garbage_collection: cleared.append(True))
    device = Device(at_most(2), where="backward").install(monkeypatch)
    train(chat_recipe(*UNSCORED, "training.max_steps=1", "training.micro_batch=8"), tmp_path / "run")
    assert device.forwards[:3] == [8, 4, 2]
    assert device.alive[:3] == [0, 0, 0]
    assert len(cleared) == 2


def test_the_smaller_micro_batch_outlives_a_resume(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    overrides = (*UNSCORED, "training.max_steps=6", "training.micro_batch=8", "training.checkpoint_every=3")
    with monkeypatch.context() as patch:
        Device(at_most(4), first_forward=2).install(patch)
        straight = train(chat_recipe(*overrides), tmp_path / "straight")

    class Cut(PlainObserver):
        def on_step(self, report: Any) -> None:
            if report.step == 4:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        Device(at_most(4), first_forward=2).install(patch)
        with pytest.raises(KeyboardInterrupt):
            train(chat_recipe(*overrides), tmp_path / "cut", observer=Cut())
    device = Device(at_most(8)).install(monkeypatch)  # and now there is room, which changes nothing
    record = train(chat_recipe(*overrides), tmp_path / "cut", resume=True)
    assert device.forwards == [4, 4] * 3
    assert record.guards["oom_retries"] == straight.guards["oom_retries"] == [{"step": 2, "from": 8, "to": 4}]
    assert record.guards["unmoved"] == []  # the first steps' guard is beside it
    assert_same_bits(tmp_path / "cut", tmp_path / "straight")


def test_a_run_ends_when_one_example_does_not_fit(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    device = Device(at_most(0)).install(monkeypatch)
    with pytest.raises(OutOfMemory, match=r"step 1 .* 2\.00 GiB\. Try training\.checkpointing=all, training\.max_tok"):
        train(chat_recipe(*UNSCORED, "training.micro_batch=8"), tmp_path / "run")
    assert device.forwards == [8, 4, 2, 1]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "oom"


def test_an_update_that_was_applied_in_part_is_not_tried_again(
    chat_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    device = Device(at_most(2), where="layer").install(monkeypatch)
    settings = ("training.optimizer_in_backward=true", "training.clip=null", "training.micro_batch=8")
    with pytest.raises(OutOfMemory, match=r"optimizer_in_backward .* Start again with training\.micro_batch=4\."):
        train(chat_recipe(*UNSCORED, *settings, method="full"), tmp_path / "run")
    assert device.forwards == [8]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("finish", r"the optimizer's update of step 1 ran out .* training\.optimizer=adamw-8bit"),
        ("gradient_norm", r"training ran out of memory: .* Try training\.checkpointing=all"),
    ],
)
def test_what_smaller_forwards_cannot_help_ends_the_run(
    name: str, told: str, chat_recipe: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    device = Device(at_most(8)).install(monkeypatch)
    monkeypatch.setattr(AfterBackward, name, device.fail)
    with pytest.raises(OutOfMemory, match=told):
        train(chat_recipe(*UNSCORED), tmp_path / "run")
    assert device.forwards == [8]


def test_other_faults_pass_untouched(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    device = Device(at_most(2), fault=RuntimeError).install(monkeypatch)
    monkeypatch.setattr(f"{__name__}.FULL", "mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied$"):
        train(chat_recipe(*UNSCORED, "training.micro_batch=8"), tmp_path / "run")
    assert device.forwards == [8]


def test_scoring_halves_its_forwards(chat_recipe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    plain, sizes = ChatTask.predict, list[int]()

    def predict(task: ChatTask, model: nn.Module, batch: Batch) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 4:
            raise torch.OutOfMemoryError(FULL)
        return plain(task, model, batch)

    recipe = chat_recipe(*STEADY, "evaluation.every=never", "training.max_steps=1")
    roomy = train(recipe, tmp_path / "roomy")
    monkeypatch.setattr(ChatTask, "predict", predict)
    record = train(recipe, tmp_path / "retried")
    assert sizes[0] == 8
    assert sorted(sizes)[-1] == 8  # of the two scored splits, each tried at once and then cut
    assert sum(size for size in sizes if size <= 4) == 16
    assert record.loss is not None
    assert roomy.loss is not None
    assert record.loss.validation == pytest.approx(roomy.loss.validation, rel=1e-6)
    monkeypatch.setattr(ChatTask, "predict", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(FULL)))
    with pytest.raises(OutOfMemory, match="scoring does not fit with one example a forward"):
        train(recipe, tmp_path / "never")


def test_running_out_is_told_from_other_faults() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert type(host.value) is RuntimeError
    for fault in (host.value, MemoryError(), torch.OutOfMemoryError(FULL)):
        assert is_out_of_memory(fault)
    for fault in (RuntimeError("CUDA error: device-side assert triggered"), ValueError("can't allocate memory")):
        assert not is_out_of_memory(fault)
    assert attempt(lambda: torch.empty(1 << 60, dtype=torch.uint8)) == Exhausted(str(host.value))
    assert attempt(lambda: 5) == 5


@pytest.mark.parametrize(
    ("setting", "said"), [("auto", "2048 tokens"), (3, 3), ("70 tokens", "70 tokens")], ids=["auto", "count", "budget"]
)
def test_a_micro_batch_is_said_as_a_recipe_says_it(setting: int | str, said: int | str) -> None:
    assert MicroBatch.of(setting, auto_tokens=2048).setting == said

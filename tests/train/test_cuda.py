"""What only a CUDA device can show; run by scripts/gpu_check."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"])
def test_each_optimizer_lowers_the_loss(optimizer: str, classify_recipe: Any, tmp_path: Path) -> None:
    overrides = ("training.epochs=20", "training.learning_rate=3e-3", f"training.optimizer={optimizer}")
    record = train(classify_recipe(*overrides, method="full"), tmp_path / "run")
    assert record.loss is not None
    assert record.loss.last is not None
    assert record.loss.first is not None
    assert record.loss.last < record.loss.first


@pytest.mark.parametrize("method", ["lora", "qlora", "prefix", "prompt", "full"])
def test_memory_is_what_the_allocator_reserved(method: str, chat_recipe: Any, tmp_path: Path) -> None:
    record = train(chat_recipe("training.max_steps=3", method=method), tmp_path / "run")
    assert record.memory is not None
    assert record.memory.kind == "cuda-reserved"
    assert record.memory.peak_bytes is not None
    assert record.memory.tensor_peak_bytes is not None
    assert record.memory.peak_bytes >= record.memory.tensor_peak_bytes > 0


def test_the_same_seed_gives_the_same_loss_as_on_the_cpu(chat_recipe: Any, tmp_path: Path) -> None:
    recipe = chat_recipe("training.max_steps=3", "training.learning_rate=1e-2", "training.warmup=0", method="full")
    on_cuda = train(recipe, tmp_path / "cuda")
    assert on_cuda.loss is not None
    assert on_cuda.loss.first == pytest.approx(10.8, abs=0.2)  # ln of a vocabulary of 49,152, untrained


def test_a_step_that_does_not_fit_is_taken_in_smaller_forwards(chat_recipe: Any, tmp_path: Path) -> None:
    # The allocator may reserve what the smallest forwards did, and less than the largest one's tensors take.
    common = ("training.max_steps=2", "training.kernels.loss=false", "data.validation=null", "data.test=null")
    peaks = []
    for count in (1, 1, 8):  # the first of them also makes what stays, such as workspaces
        gc.collect()
        torch.cuda.empty_cache()
        record = train(chat_recipe(f"training.micro_batch={count}", *common), tmp_path / f"{len(peaks)}")
        assert record.memory is not None
        peaks.append((record.memory.peak_bytes or 0, record.memory.tensor_peak_bytes or 0))
    least, most = peaks[1][0], peaks[2][1]
    assert least < most
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((least + most) / 2 / torch.cuda.get_device_properties(0).total_memory)
    try:
        record = train(chat_recipe("training.micro_batch=8", *common), tmp_path / "scarce")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    (retry,) = record.guards["oom_retries"]
    assert (retry["step"], retry["from"]) == (1, 8)
    assert retry["to"] < 8
    assert record.throughput is not None
    assert record.throughput.samples == 16

"""Checkpoints: everything a run needs to go on as if it had never stopped, written whole or not at all.

DIR/checkpoints/step-000200/{trainable.safetensors, state.pt}
DIR/checkpoints/best-000150/trainable.safetensors
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftkit.files import staged_folder
from peftkit.train.optimizers import Updates

KEPT = 2
"""Checkpoints that stay on disk; older ones are removed once a newer one is whole."""
TENSORS = "trainable.safetensors"
STATE = "state.pt"


def save_checkpoint(
    folder: Path, step: int, trainable: Mapping[str, torch.nn.Parameter], updates: Updates, state: Any
) -> None:
    """Write the checkpoint of a step, then remove the oldest beyond `KEPT`."""
    with staged_folder(folder / f"step-{step:06d}") as staging:
        _write_tensors(staging, trainable)
        torch.save({"optimizer": updates.state_dict(), "random": random_states(), "loop": state}, staging / STATE)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(checkpoint: Path, trainable: Mapping[str, torch.nn.Parameter], updates: Updates) -> Any:
    """Put a checkpoint's weights, optimizer and random states in place; return the loop's own state."""
    restore_tensors(checkpoint, trainable)
    content = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    updates.load_state_dict(content["optimizer"])
    restore_random_states(content["random"])
    return content["loop"]


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def save_best(folder: Path, step: int, trainable: Mapping[str, torch.nn.Parameter]) -> None:
    """Keep the weights of this step as the best so far; those before are removed once these are whole."""
    with staged_folder(best_folder(folder, step)) as staging:
        _write_tensors(staging, trainable)
    for old in folder.glob("best-*"):
        if old != best_folder(folder, step):
            shutil.rmtree(old)


def best_folder(folder: Path, step: int) -> Path:
    """Where the weights of the best step are kept."""
    return folder / f"best-{step:06d}"


def restore_tensors(checkpoint: Path, trainable: Mapping[str, torch.nn.Parameter]) -> None:
    """Copy saved weights into the parameters of the same names."""
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / TENSORS)
    assert set(tensors) == set(trainable), "a checkpoint holds exactly the parameters that train"
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[name])


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, as plain data and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Set all generators back to saved states."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def tensors_to_write(trainable: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The trained tensors as a file takes them: copies of those that do not lie in one piece."""
    return {name: parameter.detach().contiguous() for name, parameter in trainable.items()}


def _write_tensors(folder: Path, trainable: Mapping[str, torch.nn.Parameter]) -> None:
    from safetensors.torch import save_file

    save_file(tensors_to_write(trainable), folder / TENSORS)

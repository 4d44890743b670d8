"""A model's weights as they lie in its folder: which file holds which of the model's tensors, under which name.

Names in files need not be those of modules. What transformers itself would rename on loading is renamed here by the
same rules; where it would compute instead (stack experts, split what is fused), the files cannot be read one by one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftkit.backbones.load import resolve
from peftkit.backbones.spec import BackboneSpec
from peftkit.deploy.shards import Entry, Shard, read_header
from peftkit.errors import BackboneError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class NotByTensor(Exception):
    """These files, or this adapter, need the whole model in memory; the message says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of the model's tensors lies."""

    shard: Shard
    key: str

    @property
    def entry(self) -> Entry:
        """Its dtype, shape and bytes."""
        return self.shard.entries[self.key]

    def read(self) -> Tensor:
        """The tensor, in the dtype of the file."""
        return self.shard.read(self.key)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A folder's weights.

    Attributes:
        shards: the files, in order.
        places: by the model's own names; tied tensors under the one name that is stored.
        strange: keys that the model has no place for, such as another task's head.
    """

    folder: Path
    shards: tuple[Shard, ...]
    places: Mapping[str, Place]
    strange: tuple[str, ...]


def folder_of(spec: BackboneSpec) -> Path:
    """The folder with a backbone's files; those of a hub id are fetched first.

    Raises:
        BackboneError: they cannot be had.
    """
    folder = resolve(spec)
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(folder, revision=spec.revision, allow_patterns=["*.safetensors", "*.json", "*.md"])
        )
    except (OSError, ValueError) as fault:
        raise BackboneError(
            f"backbone {spec.name} cannot be fetched: {' '.join(str(fault).split())[:200]}. "
            "Check the name and the network, or pass a local folder as --base."
        ) from fault


def list_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in the order of their names.

    Raises:
        BackboneError: the index names a file that is not there, or cannot be read.
        NotByTensor: there are none.
    """
    index = folder / INDEX
    if not index.is_file():
        files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise NotByTensor(f"{folder} has no safetensors")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise BackboneError(f"{index} cannot be understood: {fault}. Fetch or save it again.") from fault
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise BackboneError(f"{folder} lacks {absent[0]}, which {INDEX} names. Fetch or save it again.")
    return [folder / name for name in names]


def open_weights(folder: Path, model: Any, *, replaced: Collection[str] = ()) -> WeightFiles:
    """The weights in a folder, by the names of `model`, a hollow one of the same architecture.

    Args:
        replaced: names of tensors that will come from elsewhere, and may have another shape here.

    Raises:
        BackboneError: damaged files.
        NotByTensor: pickles, or an architecture whose files are converted on loading.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    shards = tuple(read_header(path) for path in list_files(folder))
    known = model.state_dict(keep_vars=True)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    places: dict[str, Place] = {}
    strange = []
    for shard in shards:
        for key, entry in shard.entries.items():
            name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
            if converted is not None:
                raise NotByTensor(f"transformers converts the weights of {model.config.model_type} while it loads them")
            if name not in known:
                strange.append(key)
                continue
            if name in places:
                raise BackboneError(
                    f"{shard.path} and {places[name].shard.path} both have {name}. Save the model again."
                )
            if entry.shape != tuple(known[name].shape):
                if name in replaced:
                    continue
                raise BackboneError(
                    f"{shard.path}: {key} is {list(entry.shape)} and {type(model).__name__} has "
                    f"{list(known[name].shape)} there. Its config.json belongs to another model."
                )
            places[name] = Place(shard, key)
    return WeightFiles(folder, shards, places, tuple(strange))


def saved_names(model: Any, names: Sequence[str]) -> dict[str, str]:
    """The name under which `save_pretrained` would write each of a model's tensors.

    Raises:
        NotByTensor: it would compute.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    if any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(model, add_legacy=False)):
        raise NotByTensor(f"transformers converts the weights of {model.config.model_type} while it saves them")
    marks = {name: torch.empty(0) for name in names}
    reverted = {id(mark): name for name, mark in revert_weight_conversion(model, dict(marks)).items()}
    if set(reverted) != {id(mark) for mark in marks.values()}:
        raise NotByTensor(f"transformers converts the weights of {model.config.model_type} while it saves them")
    return {name: reverted[id(mark)] for name, mark in marks.items()}

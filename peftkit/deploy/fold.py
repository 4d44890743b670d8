"""Fold an adapter into its base one tensor at a time, from the base's files into files of the same layout.

Nothing but the adapter, and the module being folded, is ever in memory: a machine that could not load the model can
merge it. PEFT's own layers do the folding (see `hollow`), but for plain LoRA (see `rows`); what neither touches is
copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.backbones.load import quantization_config
from peftkit.deploy.adapter import INSIDE, Onto, Source, check_base, unfoldable
from peftkit.deploy.hollow import Hollow, open_hollow
from peftkit.deploy.rounding import quantize, round_once
from peftkit.deploy.rows import row_fold
from peftkit.deploy.shards import ShardWriter
from peftkit.deploy.weights import INDEX, WEIGHTS, NotByTensor, Place
from peftkit.files import sync_file, write_json

Say = Callable[[str], None]
Kind = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Folded:
    """What a fold has written.

    Attributes:
        recognised: what proved that the base is the adapter's.
        modules: how many modules it changes.
        dithered: how many tensors were rounded stochastically.
        digests: SHA-256 of each weights file.
    """

    recognised: str
    dtype: torch.dtype
    num_params: int
    modules: int
    dithered: int
    digests: dict[str, str]
    num_bytes: int


@dataclass(slots=True)
class _Fold:
    """A fold under way.

    Attributes:
        roots: each module that the adapter changes, by its path in the base.
        owner: the root that gives a tensor, by the tensor's name.
        kinds: dtype and shape of those tensors.
        pending: tensors that were folded and wait for their file.
        done: roots that were folded.
        requantize: whether what was quantized is so again in the merged model.
    """

    source: Source
    hollow: Hollow
    roots: dict[str, nn.Module]
    owner: dict[str, str]
    kinds: dict[str, Kind]
    pending: dict[str, Tensor] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    dithered: int = 0
    requantize: bool = False

    def copied(self, name: str) -> Place | None:
        """Where a tensor lies that the merged model takes over byte for byte; None for all others."""
        place = self.hollow.files.places.get(name)
        changed = any(name in names for names in (self.owner, self.pending, self.hollow.given, self.hollow.codes))
        return place if place is not None and not changed and place.entry.dtype == self.kind(name)[0] else None

    def kind(self, name: str) -> Kind:
        """Dtype and shape of a tensor of the merged model."""
        dtype, shape = self.kinds.get(name) or (self.hollow.state[name].dtype, tuple(self.hollow.state[name].shape))
        return self.hollow.dtype if dtype.is_floating_point else dtype, shape

    def take(self, name: str) -> Tensor:
        """A tensor of the merged model, in its final dtype; each can be taken once."""
        root = self.owner.get(name)
        if root is not None and root not in self.done:
            self._fold_module(root)
        if name in self.pending:
            return self.pending.pop(name)
        if name in self.hollow.given:
            return self._rounded(name, self.hollow.state[name].detach())
        found = self.hollow.read(name)
        return found.to(self.hollow.dtype) if found.is_floating_point() else found

    def _fold_module(self, root: str) -> None:
        plain = _plain(self.roots[root])
        names = [name for name, _ in _tensors(plain, root)]
        own = self.hollow.start is None and not any(name in self.hollow.given | self.hollow.codes for name in names)
        rows = row_fold(self.roots[root]) if own else None
        if rows is None:
            self._fold_by_peft(root)
        else:
            self.pending |= {name: self.hollow.held(name) for name in names}
            weight = f"{root}.weight"
            self.dithered += rows.fold_into(self.pending[weight], weight)
        self.done.add(root)

    def _fold_by_peft(self, root: str) -> None:
        from peft.utils.other import ModulesToSaveWrapper

        from peftkit.backbones.quiet import quietly

        wrapper: Any = self.roots[root]
        saved = isinstance(wrapper, ModulesToSaveWrapper) and wrapper.active_adapters
        inside = wrapper.modules_to_save[wrapper.active_adapter] if saved else wrapper
        grid: dict[str, Tensor] = {}
        with self.hollow.filled(inside, grid), torch.no_grad():
            try:
                with quietly():
                    plain = fold_module(wrapper)
            except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as fault:
                told = f"peft says of {root}: {' '.join(str(fault).split())}"
                raise unfoldable(self.source.adapter, self.source.config, told) from fault
            for name, tensor in _tensors(plain, root):
                self.pending[name] = self._rounded(name, tensor.detach(), grid.get(name))

    def _rounded(self, name: str, exact: Tensor, base: Tensor | None = None) -> Tensor:
        if not exact.is_floating_point():
            return exact.clone()
        dtype = self.hollow.dtype
        narrow = dtype != torch.float32 and name not in self.hollow.codes
        if base is None and narrow and self.hollow.stored_name(name) is not None:
            base = self.hollow.held(name)
        fits = base if base is not None and base.shape == exact.shape else None
        rounded, dithered = round_once(exact.float(), dtype, fits, name)
        self.dithered += dithered
        return rounded


def fold_by_tensor(source: Source, folder: Path, *, onto: Onto, say: Say) -> Folded:
    """Write the merged model's weights, configuration and generation settings into `folder`.

    Args:
        onto: which weights of a quantized base the merged model gets.

    Raises:
        NotByTensor: only the whole model in memory will do.
        MethodError: the method has no fold.
        BackboneError: the base is not the adapter's, or is damaged.
    """
    if source.spec.remote_code:
        raise NotByTensor("the base ships its own Python code")
    hollow, backbone = open_hollow(source, quantization="none" if onto == "original" else None)
    recognised = check_base(source, backbone)
    fold = _open(source, hollow)
    fold.requantize = onto == "requantized"
    stored, untied = _names_to_store(fold)
    layout = _layout(hollow, stored)
    digests, places = dict[str, str](), dict[str, str]()
    # the disk takes one file while the next is folded, and a core is left to the thread that hashes and writes
    with ThreadPoolExecutor(1) as flusher, fewer_threads(1):
        flushed = []
        for index, (file, names) in enumerate(layout.items(), 1):
            say(f"folding {file} ({index} of {len(layout)})")
            write_shard = _write_codes if fold.requantize else _write_shard
            digests[file], keys = write_shard(fold, folder / file, names)
            places |= dict.fromkeys(keys, file)
            flushed.append(flusher.submit(sync_file, folder / file))
        for each in flushed:
            each.result()
    assert not fold.pending, f"{list(fold.pending)[:3]} were folded and not stored"
    num_bytes = sum((folder / file).stat().st_size for file in digests)
    if len(layout) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": places})
    if fold.requantize:
        hollow.base.config.quantization_config = quantization_config(source.spec, backbone.dims, hollow.dtype)
    write_configuration(hollow.base, folder, hollow.files.folder, dtype=hollow.dtype, untied=untied)
    return Folded(
        recognised=recognised,
        dtype=hollow.dtype,
        num_params=backbone.dims.num_params,
        modules=len(fold.roots),
        dithered=fold.dithered,
        digests=digests,
        num_bytes=num_bytes,
    )


@contextmanager
def fewer_threads(spared: int) -> Iterator[None]:
    """Within the block, torch computes with so many threads less, with one at least: waiting ones take their core from
    whoever else works."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - spared))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fold_module(wrapper: Any) -> nn.Module:
    """A module with its adapter folded in, as PEFT unloads it. The module's own weights are changed in place."""
    unload = getattr(wrapper, "unload_and_optionally_merge_module", None)  # layers that need more than a merge have it
    if unload is not None:
        plain: nn.Module = unload(merge=True, safe_merge=False, adapter_names=None)
        return plain
    wrapper.merge(safe_merge=False)
    merged: nn.Module = wrapper.get_base_layer()
    return merged


def write_configuration(model: Any, folder: Path, base: Path, *, dtype: torch.dtype, untied: bool) -> None:
    """Write `config.json` and `generation_config.json` as `save_pretrained` would."""
    from peftkit.backbones.quiet import quietly

    config = model.config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if untied:
        config.get_text_config().tie_word_embeddings = False
        config.tie_word_embeddings = False
    with quietly():
        config.save_pretrained(str(folder))
        if (base / "generation_config.json").is_file():
            shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
        elif model.can_generate():
            model.generation_config.save_pretrained(str(folder))


def _open(source: Source, hollow: Hollow) -> _Fold:
    """The modules that the adapter changes, and which tensors each of them will give."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if not isinstance(hollow.adapted.base_model, BaseTuner):
        raise unfoldable(source.adapter, source.config, "its layers are not changes of weights")
    roots: dict[str, nn.Module] = {}
    for name, module in hollow.adapted.named_modules():
        inner = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        path = name.removeprefix(INSIDE)
        if inner and not any(path.startswith(root + ".") for root in roots):
            roots[path] = module
    plain = {path: _plain(module) for path, module in roots.items()}
    given = {name: (path, tensor) for path, module in plain.items() for name, tensor in _tensors(module, path)}
    for name, (_, tensor) in given.items():
        if hollow.name_of(tensor) is not None and name not in hollow.given and hollow.stored_name(name) is None:
            raise NotByTensor(f"the adapter adds to {name}, which the base's files do not have")
    return _Fold(
        source,
        hollow,
        roots,
        owner={name: path for name, (path, _) in given.items()},
        kinds={name: (tensor.dtype, tuple(tensor.shape)) for name, (_, tensor) in given.items()},
    )


def _plain(module: Any) -> nn.Module:
    """The module that will be left of one that the adapter changes."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        return _plain(module.modules_to_save[module.active_adapter] if active else module.original_module)
    if isinstance(module, TrainableTokensWrapper):
        return _plain(module.token_adapter)
    plain: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return plain


def _tensors(module: nn.Module, path: str) -> Iterator[tuple[str, Tensor]]:
    """Parameters and stored buffers of a module, by their names in the base."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield f"{path}.{name}", tensor


def _names_to_store(fold: _Fold) -> tuple[list[str], bool]:
    """The tensors that the merged model's files have, and whether tied ones had to be told apart.

    Raises:
        NotByTensor: one of them is nowhere to be found.
    """
    hollow, untied = fold.hollow, False
    stored: list[str] = []
    for name in hollow.state:
        names = hollow.tied(name)
        if name != names[0]:
            continue
        changed = [each for each in names if each in fold.owner]
        kept = next((each for each in names if each in hollow.files.places), name)
        if len(names) > 1 and changed:
            tensors = {each: fold.take(each) for each in names}
            if all(torch.equal(tensors[kept], other) for other in tensors.values()):
                tensors = {kept: tensors[kept]}
            untied = untied or len(tensors) > 1
            fold.pending |= tensors
            stored += tensors
            continue
        if not changed and name not in hollow.given and kept not in hollow.files.places:
            raise NotByTensor(f"neither the base nor the adapter has {name}")
        stored.append(kept)
    return stored, untied


def _layout(hollow: Hollow, stored: list[str]) -> dict[str, list[str]]:
    """The tensors of each file, in order: the base's files and order, and what is new in the last of them."""
    layout: dict[str, list[str]] = {}
    wanted = set(stored)
    for shard in hollow.files.shards:
        keys = {place.key: name for name, place in hollow.files.places.items() if place.shard is shard}
        names = [keys[key] for key in shard.entries if keys.get(key) in wanted]
        layout[WEIGHTS if len(hollow.files.shards) == 1 else shard.path.name] = names
        wanted.difference_update(names)
    [*layout.values()][-1].extend(name for name in stored if name in wanted)
    return {file: names for file, names in layout.items() if names}


def _write_codes(fold: _Fold, path: Path, names: list[str]) -> tuple[str, list[str]]:
    """The same with quantized layers in NF4: those that the adapter changed anew, the others as loading does."""
    hollow = fold.hollow
    tensors: dict[str, Tensor] = {}
    for name in names:
        if name not in hollow.codes:
            tensors[hollow.targets[name]] = fold.take(name)
        elif name in fold.owner:
            tensors |= quantize(fold.take(name), hollow.targets[name])
        else:
            tensors |= quantize(hollow.files.places[name].read().to(hollow.dtype), hollow.targets[name])
    with ShardWriter(path, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    return writer.digest, list(tensors)


def _write_shard(fold: _Fold, path: Path, names: list[str]) -> tuple[str, list[str]]:
    """Write one file; returns its digest, and the keys in it."""
    targets = fold.hollow.targets
    with ShardWriter(path, {targets[name]: fold.kind(name) for name in names}) as writer:
        for name in names:
            place = fold.copied(name)
            if place is not None:
                writer.copy(targets[name], place.shard, place.key)
            else:
                writer.write(targets[name], fold.take(name))
    return writer.digest, list(writer.plan)

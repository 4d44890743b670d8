"""The activation cache: training from it equals training without it, and what would not be exact is refused."""

from __future__ import annotations

import copy
import json
import random
import threading
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from torch import Tensor, nn

from peftkit.data.batching import Batch, collate, pack
from peftkit.data.features import Features
from peftkit.errors import InputError
from peftkit.methods.base import Adapted
from peftkit.prepare import prepare
from peftkit.recipe import Recipe
from peftkit.tasks.base import Task
from peftkit.train import activation_cache
from peftkit.train.activation_cache import ActivationCache, cache_activations, open_cache, replaying
from peftkit.train.activations import set_checkpointing
from peftkit.train.frozen_layers import CachePlan, Refusal, lowest_trainable_block, plan_cache, repeated_blocks
from peftkit.train.progress import PlainObserver

TOP = {"kind": "lora", "rank": 4, "alpha": 8, "layers": "top-1"}
Usage = namedtuple("Usage", "total used free")  # as shutil.disk_usage gives it


@dataclass
class Case:
    """A model with something to cache, and its examples of unequal lengths."""

    adapted: Adapted
    task: Task
    features: list[Features]

    @property
    def model(self) -> nn.Module:
        return self.adapted.model

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = repeated_blocks(self.model)
        assert blocks is not None
        return blocks

    def plan(self, **settings: Any) -> CachePlan | Refusal:
        return plan_cache(self.model, self.features, pad_id=0, settings=settings)

    def open(self, *, max_tokens: int = 40, features: Sequence[Features] | None = None, **settings: Any) -> Any:
        plan = self.plan(**settings)
        assert isinstance(plan, CachePlan), plan.reason
        return self.open_planned(plan, max_tokens=max_tokens, features=features)

    def open_planned(
        self, plan: CachePlan, *, max_tokens: int = 40, features: Sequence[Features] | None = None, say: Any = print
    ) -> ActivationCache:
        return open_cache(self.model, plan, features or self.features, pad_id=0, max_tokens=max_tokens, say=say)

    def batch(self, *positions: int) -> Batch:
        return collate([self.features[i] for i in positions or range(len(self.features))], 0)

    def step(self, batch: Batch, cache: ActivationCache | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch in training mode, and the gradients of all that trains."""
        self.model.train().zero_grad(set_to_none=True)
        with replaying(cache, batch):
            loss = self.task.loss(self.model, batch)
        loss.backward()
        found = self.adapted.trainable()
        assert all(parameter.grad is not None for parameter in found.values())
        return loss.detach(), {n: p.grad.clone() for n, p in found.items() if p.grad is not None}


LOADED: dict[str, Case] = {}


def case_of(recipe: Recipe) -> Case:
    """A copy of its own of what the recipe attaches; files are read once."""
    if recipe.digest not in LOADED:
        ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
        backbone = ready.backbone
        found = ready.task.encode(ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128)
        torch.manual_seed(0)
        for parameter in ready.adapted.trainable().values():
            nn.init.normal_(parameter, std=0.1)  # a zero half of an adapter would hide the other's gradient
        assert len({len(feature) for feature in found.features}) > 3
        LOADED[recipe.digest] = Case(ready.adapted, ready.task, found.features)
    made = LOADED[recipe.digest]
    return Case(copy.deepcopy(made.adapted), made.task, made.features)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of one test."""
    monkeypatch.setattr(activation_cache, "home", lambda: tmp_path / "home")
    return tmp_path / "home" / "activations"


@pytest.fixture
def chat(chat_recipe: Any) -> Case:
    """Half of two layers frozen."""
    return case_of(chat_recipe(method=TOP))


@pytest.fixture
def probe(classify_recipe: Any) -> Case:
    """All layers frozen, a head that trains."""
    return case_of(classify_recipe("training.dropout=0", method="head"))


@pytest.fixture(params=["chat", "probe"])
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.getfixturevalue(request.param)
    return made


@contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    """One entry for each run of a module."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda _, args, output: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def first_inside(case: Case) -> nn.Module:
    """A module inside the lowest block, which runs whenever the block's own code does."""
    return next(module for module in case.blocks[0].modules() if isinstance(module, nn.Linear))


def test_the_lowest_trained_block_bounds_what_is_cached(chat: Case, probe: Case) -> None:
    assert lowest_trainable_block(chat.blocks) == 1
    assert lowest_trainable_block(probe.blocks) == len(probe.blocks) == 2
    chat.blocks[0].requires_grad_(True)
    assert lowest_trainable_block(chat.blocks) == 0


@pytest.mark.parametrize("checkpointing", ["off", "all"])
def test_loss_and_gradients_equal_those_without_the_cache(case: Case, checkpointing: str) -> None:
    set_checkpointing(case.model, checkpointing)
    cache = case.open(max_tokens=40)  # cut otherwise than the batches below
    for positions in ((), (3, 0), (5,)):
        batch = case.batch(*positions)
        expected, gradients = case.step(batch, None)
        loss, found = case.step(batch, cache)
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # float32, summed in another order
        for name, gradient in gradients.items():
            assert gradient.norm() > 0
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm()


def test_scores_equal_those_without_the_cache(case: Case) -> None:
    cache, batch = case.open(), case.batch()
    case.model.eval()
    expected = case.task.predict(case.model, batch)
    with replaying(cache, batch), counting(first_inside(case)) as calls:
        found = case.task.predict(case.model, batch)
    assert not calls
    for one, other in zip(expected, found, strict=True):
        assert one["row"] == other["row"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # float32, summed in another order


def test_bfloat16_states_are_kept_to_the_bit(chat_recipe: Any) -> None:
    case = case_of(chat_recipe("backbone.dtype=bfloat16", method=TOP))
    cache = case.open(max_tokens=1)  # each example alone, as below, so that no sum is taken in another order
    assert cache.plan.dtype == torch.bfloat16
    for position in range(len(case.features)):
        batch = case.batch(position)
        expected, gradients = case.step(batch, None)
        loss, found = case.step(batch, cache)
        assert torch.equal(loss, expected)
        assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_padded_and_packed_batches_get_the_same_states(chat: Case) -> None:
    cache = chat.open()
    group = [chat.features[i] for i in (4, 0, 6)]
    padded, packed = cache.hidden(collate(group, 0)), cache.hidden(pack(group))
    lengths = [len(feature) for feature in group]
    assert padded.shape == (3, max(lengths), 32)
    assert packed.shape == (1, sum(lengths), 32)
    parts = torch.split(packed[0], lengths)
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        assert torch.equal(padded[row, :length], part)
        assert part.norm() > 0
        assert not padded[row, length:].any()


def test_a_later_run_reads_the_file_and_runs_no_frozen_layer(case: Case) -> None:
    plan = case.plan()
    assert isinstance(plan, CachePlan)
    with counting(first_inside(case)) as calls:
        first = case.open_planned(plan)
    assert first.built
    assert len(calls) > 1
    with counting(first_inside(case)) as calls:
        second = case.open_planned(plan)
        case.step(case.batch(), second)
    assert not second.built
    assert second.path == first.path
    assert not calls


def test_what_trained_meanwhile_and_what_is_random_in_a_head_share_one_cache(chat: Case, probe: Case) -> None:
    for case in (chat, probe):
        first = case.open()
        for parameter in case.adapted.trainable().values():
            nn.init.normal_(parameter)
        assert not case.open().built
        assert case.open().path == first.path


def test_the_key_changes_with_whatever_changes_the_states(chat: Case, chat_recipe: Any) -> None:
    other = [replace(chat.features[0], input_ids=chat.features[0].input_ids + 1), *chat.features[1:]]
    typed = [replace(f, token_type_ids=np.zeros_like(f.input_ids)) for f in chat.features]
    caches = {
        "as it is": chat.open(),
        "tokens": chat.open(features=other),
        "segments": chat.open(features=typed),
        "fewer": chat.open(features=chat.features[:-1]),
        "settings": chat.open(kernels={"layers": False}),
        "dtype": case_of(chat_recipe("backbone.dtype=bfloat16", method=TOP)).open(),
    }
    with torch.no_grad():
        first_inside(chat).weight[0, 0] += 2**-10
    caches["weights"] = chat.open()
    chat.model.requires_grad_(False)
    caches["layers"] = chat.open()
    assert caches["layers"].plan.index == 2
    assert all(cache.built for cache in caches.values())
    assert len({cache.path for cache in caches.values()}) == len(caches)


def test_the_key_ignores_order_and_targets(chat: Case) -> None:
    first = chat.open()
    again = [replace(feature, target=np.roll(np.asarray(feature.target), 1)) for feature in reversed(chat.features)]
    assert not chat.open(features=again).built
    assert torch.equal(chat.open(features=again).hidden(chat.batch()), first.hidden(chat.batch()))


def refusal(case: Case) -> str:
    found = case.plan()
    assert isinstance(found, Refusal)
    return found.reason


def test_methods_that_train_from_the_bottom_are_refused(chat_recipe: Any) -> None:
    assert "method.layers=top-N" in refusal(case_of(chat_recipe(method="lora")))
    assert "virtual tokens" in refusal(case_of(chat_recipe(method={"kind": "prompt", "virtual_tokens": 3})))
    reason = refusal(case_of(chat_recipe(method={"kind": "prefix", "virtual_tokens": 3})))
    assert "acts below the frozen layers: prompt_encoder" in reason


def test_a_trained_head_that_is_tied_to_the_embeddings_is_refused(chat: Case) -> None:
    chat.model.get_output_embeddings().weight.requires_grad_(True)  # type: ignore[operator,union-attr]
    assert "embed_tokens" in refusal(chat)


def test_dropout_in_frozen_layers_is_refused_with_the_remedy(classify_recipe: Any) -> None:
    assert "training.dropout=0" in refusal(case_of(classify_recipe(method="head")))
    embeddings_alone = case_of(classify_recipe("training.dropout=0", method="head"))
    embeddings_alone.model.bert.embeddings.dropout.p = 0.1  # type: ignore[union-attr]
    assert "training.dropout=0" in refusal(embeddings_alone)


def test_dropout_above_the_frozen_layers_is_no_obstacle(chat_recipe: Any) -> None:
    case = case_of(chat_recipe(method=TOP | {"dropout": 0.5}))
    cache, batch = case.open(), case.batch()
    torch.manual_seed(3)
    expected, _ = case.step(batch, None)
    torch.manual_seed(3)  # the frozen part draws nothing, so the layers above it draw the same
    loss, _ = case.step(batch, cache)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # float32, summed in another order


def test_int8_weights_are_refused(chat: Case) -> None:
    packed = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    chat.blocks[0].register_parameter("packed", packed)
    assert "backbone.quantization=nf4" in refusal(chat)


def test_layers_that_return_more_than_a_tensor_are_refused(chat: Case) -> None:
    chat.blocks[0].register_forward_hook(lambda module, args, output: (output, None))
    assert "something else than one vector" in refusal(chat)


def test_layers_that_look_at_other_examples_are_refused(chat: Case) -> None:
    chat.blocks[0].register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    assert "when others are in its batch" in refusal(chat)


def test_upper_layers_that_read_the_inside_of_lower_ones_are_refused(chat: Case) -> None:
    seen: dict[str, Tensor] = {}
    first_inside(chat).register_forward_hook(lambda module, args, output: seen.update(inside=output))

    def add(module: nn.Module, args: Any) -> Any:
        inside = seen.pop("inside").mean(-1, keepdim=True)
        return args[0] + inside, *args[1:]

    chat.blocks[1].register_forward_pre_hook(add)
    assert "use more of the frozen ones" in refusal(chat)


def test_a_model_without_one_list_of_layers_is_refused(chat: Case) -> None:
    found = plan_cache(nn.Linear(2, 2), chat.features, pad_id=0)
    assert isinstance(found, Refusal)
    assert "no single list" in found.reason


def test_a_refusal_ends_the_run_with_its_reason(chat_recipe: Any) -> None:
    case = case_of(chat_recipe(method="lora"))
    with pytest.raises(InputError, match=r"activation_cache: the lowest layer trains.*activation_cache=false"):
        cache_activations(case.model, [case.features], pad_id=0, max_tokens=40, settings={}, say=print)


def test_each_split_has_its_own_cache(chat: Case) -> None:
    splits = [chat.features, [replace(f, row=i) for i, f in enumerate(chat.features[5:])]]
    train, held_out = cache_activations(chat.model, splits, pad_id=0, max_tokens=40, settings={}, say=print)
    assert train.path != held_out.path
    expected = train.hidden(chat.batch(6))
    # float32, padded beside other examples
    torch.testing.assert_close(held_out.hidden(collate([splits[1][1]], 0)), expected, rtol=1e-4, atol=1e-5)


def test_planning_and_filling_leave_the_model_and_the_generators_as_they_were(chat: Case, classify_recipe: Any) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    with_dropout = case_of(classify_recipe(method="head"))  # refused, after its layers drew at random
    for act, case in ((chat.open, chat), (with_dropout.plan, with_dropout)):
        set_seed(0)
        expected = draw()
        set_seed(0)
        case.model.train()
        act()
        assert case.model.training
        assert draw() == expected


def test_names_of_parameters_stay_while_the_cache_answers(case: Case, tmp_path: Path) -> None:
    before = list(case.model.state_dict())
    batch = case.batch()
    cache = case.open()
    with replaying(cache, batch):
        assert list(case.model.state_dict()) == before
        case.adapted.save(tmp_path / "inside")
    case.adapted.save(tmp_path / "outside")
    names = sorted(path.name for path in (tmp_path / "outside").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "inside").iterdir())
    assert all("forward" not in vars(block) for block in case.blocks)


def test_a_replaced_forward_is_put_back(chat: Case) -> None:
    own = chat.blocks[0].forward
    chat.blocks[0].forward = own
    cache = chat.open()

    def fail() -> None:
        with replaying(cache, chat.batch()):
            assert chat.blocks[0].forward is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(chat.blocks[0])["forward"] is own


def test_two_that_ask_at_once_build_once(chat: Case, chat_recipe: Any, folder: Path) -> None:
    other = case_of(chat_recipe(method=TOP))
    plans = [one.plan() for one in (chat, other)]
    made: list[ActivationCache] = []
    thread = threading.Thread(target=lambda: made.append(other.open_planned(plans[1])))  # type: ignore[arg-type]

    def while_it_builds(text: str) -> None:
        thread.start()
        (lock,) = folder.glob("*/.lock")
        with pytest.raises(Timeout):
            FileLock(lock).acquire(blocking=False)

    made.append(chat.open_planned(plans[0], say=while_it_builds))  # type: ignore[arg-type]
    thread.join()
    assert [cache.built for cache in made] == [True, False]
    assert torch.equal(made[0].hidden(chat.batch()), made[1].hidden(chat.batch()))


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_whole(chat: Case, folder: Path) -> None:
    plan = chat.plan()
    assert isinstance(plan, CachePlan)
    with counting(first_inside(chat)) as calls:

        def interrupt(module: nn.Module, args: Any) -> None:
            if len(calls) == 2:
                raise KeyboardInterrupt

        handle = first_inside(chat).register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            chat.open_planned(plan, max_tokens=1)
        handle.remove()
    (parent,) = folder.iterdir()
    assert [path.name for path in parent.iterdir()] == [".lock"]
    killed = parent / "staging of a run that was killed"
    killed.mkdir()
    (killed / "hidden.bin").write_bytes(b"half")
    cache = chat.open_planned(plan)
    assert cache.built
    assert not killed.exists()
    assert cache.path.stat().st_size == sum(len(f) for f in chat.features) * 32 * 4  # positions, hidden, float32


@pytest.mark.parametrize("damage", ["cut", "one bit", "no index", "index of nothing"])
def test_what_is_damaged_is_made_anew(chat: Case, damage: str) -> None:
    first = chat.open()
    expected, path = first.hidden(chat.batch()), first.path
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-4])
    elif damage == "one bit":
        content[1000] ^= 1
        path.write_bytes(content)
    elif damage == "no index":
        (path.parent / "index.json").unlink()
    else:
        (path.parent / "index.json").write_text("[]")
    again = chat.open()
    assert again.built
    assert torch.equal(again.hidden(chat.batch()), expected)
    assert not chat.open().built


def test_a_file_that_is_cut_in_use_stops_the_run(chat: Case) -> None:
    cache = chat.open()
    with cache.path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="cut while it was in use"):
        cache.hidden(chat.batch())


def test_a_disk_that_is_too_full_is_told_before_anything_is_computed(
    chat: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = chat.plan()
    assert isinstance(plan, CachePlan)
    needed = sum(len(feature) for feature in chat.features) * 32 * 4  # positions, hidden, float32
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - needed + 1, needed - 1))
    with (
        counting(first_inside(chat)) as calls,
        pytest.raises(InputError, match=r"needs \d+\.\d KiB in .* are free there.*PEFTKIT_HOME"),
    ):
        chat.open_planned(plan)
    assert not calls
    assert not list(folder.glob("*/whole"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - needed, needed))
    assert chat.open_planned(plan).built


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(chat: Case, folder: Path) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where a folder is needed")
    with pytest.raises(InputError, match=r"cannot write .*PEFTKIT_HOME"):
        chat.open()


def test_the_index_says_what_the_file_is(chat: Case) -> None:
    index = json.loads((chat.open().path.parent / "index.json").read_text())
    assert "peftkit" in index["about"]
    assert (index["layers"], index["hidden"], index["dtype"], index["examples"]) == (1, 32, "torch.float32", 8)

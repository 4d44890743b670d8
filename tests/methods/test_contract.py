"""What holds for every method, on an encoder that classifies and on a causal model that chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from peftkit.data.batching import collate
from peftkit.errors import MethodError
from peftkit.prepare import Prepared, prepare
from peftkit.recipe import Recipe
from peftkit.run import open_run, train
from peftkit.train.fastpath import FastPath
from peftkit.train.loop import Loop
from peftkit.train.progress import PlainObserver

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
TRAINED: dict[str, Any] = {
    "full": {"kind": "full"},
    "lora": LORA,
    "lora-top-1": LORA | {"layers": "top-1"},
    "lora-named": LORA | {"targets": ["query", "q_proj"]},
    "rslora": LORA | {"rslora": True},
    "dora": LORA | {"dora": True},
    "gaussian": LORA | {"init": "gaussian"},
    "pissa": LORA | {"init": "pissa"},
    "olora": LORA | {"init": "olora"},
    "prefix": {"kind": "prefix", "virtual_tokens": 3},
    "prefix-projected": {"kind": "prefix", "virtual_tokens": 3, "projection": 8},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "head": {"kind": "head"},
    "ia3": {"kind": "peft", "type": "IA3"},
    "p-tuning": {"kind": "peft", "type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "vera": {"kind": "peft", "type": "VERA", "r": 4, "target_modules": ["query", "q_proj"]},
    "oft": {"kind": "peft", "type": "OFT", "oft_block_size": 4, "target_modules": "all-linear"},
    "miss": {"kind": "peft", "type": "MISS", "r": 4, "target_modules": "all-linear"},
}
UNCHANGED_AT_START = (
    "lora",
    "lora-top-1",
    "lora-named",
    "rslora",
    "dora",
    "gaussian",
    "pissa",
    "olora",
    "ia3",
    "oft",
    "miss",
)
TASKS = ("classify", "chat")


def cases() -> list[Any]:
    return [pytest.param(n, t, id=f"{n}-{t}") for n in TRAINED for t in TASKS if (n, t) != ("head", "chat")]


@pytest.fixture
def recipe_for(classify_recipe: Any, chat_recipe: Any) -> Any:
    def build(name: str, task: str, *overrides: str) -> Recipe:
        method = dict(TRAINED[name])
        leaf = {"classify": "query", "chat": "q_proj"}[task]
        for key in ("targets", "target_modules"):
            if isinstance(method.get(key), list):
                method[key] = [leaf]
        made: Recipe = {"classify": classify_recipe, "chat": chat_recipe}[task](*overrides, method=method)
        return made

    return build


def prepared(recipe: Recipe) -> Prepared:
    return prepare(recipe, PlainObserver(), device=torch.device("cpu"))


def features_of(ready: Prepared, recipe: Recipe) -> list[Any]:
    backbone = ready.backbone
    found = ready.task.encode(ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128)
    return found.features


def loop_of(ready: Prepared, recipe: Recipe, folder: Path) -> Loop:
    return Loop(
        ready.adapted,
        ready.task,
        recipe.training,
        recipe.evaluation,
        train=features_of(ready, recipe),
        validation=None,
        fast=FastPath.open(
            ready.adapted.model,
            recipe.training.kernels,
            attention="auto",
            pad_id=ready.backbone.tokenizer.pad_token_id,
            say=PlainObserver().say,
        ),
        seed=recipe.seed,
        folder=folder,
        accelerator=Accelerator(),
        observer=PlainObserver(),
    )


@pytest.mark.parametrize(("name", "task"), cases())
def test_the_count_equals_what_is_attached(name: str, task: str, recipe_for: Any) -> None:
    recipe = recipe_for(name, task)
    ready = prepared(recipe)
    attached = sum(parameter.numel() for parameter in ready.adapted.trainable().values())
    assert recipe.method.trainable_params(ready.backbone.dims) == attached > 0


@pytest.mark.parametrize(("name", "task"), cases())
def test_only_declared_tensors_move_and_all_of_them_do(name: str, task: str, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(name, task, "training.max_steps=3", "training.learning_rate=1e-2", "training.warmup=0")
    ready = prepared(recipe)
    trainable = set(ready.adapted.trainable())
    before = {key: value.clone() for key, value in ready.adapted.model.state_dict().items()}
    loop_of(ready, recipe, tmp_path).fit()
    moved = {k for k, value in ready.adapted.model.state_dict().items() if not torch.equal(value, before[k])}
    names = {key for key, _ in ready.adapted.model.named_parameters(remove_duplicate=False)}
    tied = {"lm_head.weight"} if name == "full" else set()
    assert moved & names <= trainable | tied
    assert trainable <= moved


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", UNCHANGED_AT_START)
def test_attaching_leaves_the_outputs_as_they_were(name: str, task: str, recipe_for: Any) -> None:
    recipe = recipe_for(name, task)
    with torch.no_grad():
        plain = prepared(recipe_for("full", task))
        batch = collate(features_of(plain, recipe), plain.backbone.tokenizer.pad_token_id)
        expected = plain.task.predict(plain.adapted.model.eval(), batch)
        ready = prepared(recipe)
        found = ready.task.predict(ready.adapted.model.eval(), batch)
    for one, other in zip(expected, found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)  # float32, weights split and added back


@pytest.mark.parametrize(("name", "task"), cases())
def test_a_saved_run_answers_as_it_did(name: str, task: str, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(name, task, "training.max_steps=2", "training.learning_rate=1e-2", "evaluation.every=never")
    record = train(recipe, tmp_path / "run")
    opened = open_run(tmp_path / "run")
    ready_features = opened.task.encode(
        prepared(recipe).splits.test, opened.backbone.tokenizer, opened.backbone.dims, recipe.data, max_tokens=1024
    ).features
    batch = collate(ready_features, opened.backbone.tokenizer.pad_token_id)
    again = opened.task.metrics(
        sorted(opened.task.predict(opened.adapted.model, batch), key=lambda p: p["row"]), intervals=False
    )
    for metric, score in again.items():
        assert score.value == pytest.approx(record.metrics[metric].value, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "rate"),
    [
        ("full", "classify", "3e-3"),
        ("lora", "classify", "1e-2"),
        ("dora", "classify", "1e-2"),
        ("prefix", "classify", "3e-2"),
        ("prompt", "classify", "3e-2"),
        ("full", "chat", "1e-2"),
        ("lora", "chat", "3e-2"),
        ("dora", "chat", "3e-2"),
    ],
)
def test_eight_examples_can_be_learned_by_heart(
    name: str, task: str, rate: str, recipe_for: Any, tmp_path: Path
) -> None:
    settings = ["training.epochs=120", f"training.learning_rate={rate}", "training.warmup=0.1"]
    settings += ["training.dropout=0"] if task == "classify" else []  # Llama has none
    recipe = recipe_for(name, task, *settings)
    fitted = loop_of(prepared(recipe), recipe, tmp_path).fit()
    assert fitted.loss.first is not None
    assert fitted.loss.last is not None
    assert fitted.loss.last < 0.5 * fitted.loss.first


def test_full_finetuning_of_a_quantized_backbone_is_refused_with_the_remedy(classify_recipe: Any) -> None:
    recipe = classify_recipe("backbone.quantization=nf4", method="full")
    with pytest.raises(MethodError, match="method=qlora"):
        prepared(recipe)


def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are(classify_recipe: Any) -> None:
    recipe = classify_recipe(method={"kind": "lora", "targets": ["q_proj"]})
    with pytest.raises(MethodError, match=r"'q_proj' matches no linear layer.*dense, key, query, value"):
        prepared(recipe)


def test_a_layer_that_does_not_exist_is_refused(classify_recipe: Any) -> None:
    with pytest.raises(MethodError, match="the backbone's layers are 0 to 1"):
        prepared(classify_recipe(method={"kind": "lora", "layers": [0, 7]}))


def test_an_unknown_peft_type_names_the_nearest(classify_recipe: Any) -> None:
    with pytest.raises(MethodError, match="did you mean 'VERA'"):
        prepared(classify_recipe(method={"kind": "peft", "type": "verra"}))


def test_an_unknown_field_of_a_peft_type_names_the_nearest(classify_recipe: Any) -> None:
    with pytest.raises(MethodError, match="did you mean 'target_modules'"):
        prepared(classify_recipe(method={"kind": "peft", "type": "VERA", "target_module": ["query"]}))


def test_the_head_method_is_refused_where_there_is_no_new_head(chat_recipe: Any) -> None:
    with pytest.raises(MethodError, match="task=classify"):
        prepared(chat_recipe(method="head"))


def test_a_prefix_starts_as_its_text_before_the_input(chat_recipe: Any) -> None:
    def start(**changes: Any) -> Prepared:
        return prepared(chat_recipe(method={"kind": "prefix", "virtual_tokens": 7, **changes}))

    ready = start(init="text", init_text="good words first")
    model: Any = ready.adapted.model.eval()
    words = ready.backbone.tokenizer("good words first")["input_ids"]
    front = torch.tensor([(words * 7)[:7]])
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        with model.disable_adapter():
            expected = model(input_ids=torch.cat([front, tokens], dim=1)).logits[:, 7:]
    assert torch.allclose(found, expected, atol=1e-5)  # float32, one pass over the tokens against two

    def values(ready: Prepared) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in ready.adapted.trainable().values()])

    drawn = values(start())
    assert torch.equal(drawn, values(start(init="vocabulary"))), "the default, and of the recipe's seed"
    assert not torch.equal(drawn, values(ready))
    assert values(start(init="random")).std() == pytest.approx(1, abs=0.1), "PEFT's own"


@pytest.mark.parametrize(("task", "changes"), [("classify", {}), ("chat", {"projection": 8})])
def test_a_prefix_that_no_text_can_start_says_so(
    task: str, changes: Any, classify_recipe: Any, chat_recipe: Any
) -> None:
    build = {"classify": classify_recipe, "chat": chat_recipe}[task]
    with pytest.raises(MethodError, match="for decoders without projection"):
        prepared(build(method={"kind": "prefix", "init": "vocabulary", **changes}))


def test_qlora_holds_packed_weights_and_trains_float32_adapters(classify_recipe: Any) -> None:
    ready = prepared(classify_recipe(method="qlora"))
    dtypes = {name: parameter.dtype for name, parameter in ready.adapted.model.named_parameters()}
    packed = [name for name, dtype in dtypes.items() if dtype == torch.uint8]
    assert len(packed) == len(ready.backbone.dims.linears)
    assert {dtypes[name] for name in ready.adapted.trainable()} == {torch.float32}

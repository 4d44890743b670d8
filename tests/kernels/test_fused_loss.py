"""Output layer and loss in one equal the two apart, for every head that is known, and hold no more than a chunk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peftkit.data.batching import Batch, collate, pack
from peftkit.data.features import IGNORED, Features
from peftkit.kernels.attention import packed_attention
from peftkit.kernels.loss import DIVISORS, FACTORS, HEADS, SOFTCAPS, head_trouble, linear_cross_entropy, read_head
from peftkit.prepare import prepare
from peftkit.tasks.language import LanguageTask
from peftkit.train.progress import PlainObserver

COUNT, HIDDEN, VOCABULARY, RANK = 11, 8, 53, 3
FOUR_ROWS = 4 * 4 * VOCABULARY
"""Bytes of a chunk of four positions: eleven make chunks of four, four and three."""
ROUNDING = 2e-5
"""Of the largest entry, in float32: a sum of 53 products rounds each by 6e-8, and models sum over layers besides."""


def problem(dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Everything that a head can have, with logits of a spread of about six; and the targets."""
    torch.manual_seed(0)
    shapes = {
        "hidden": (COUNT, HIDDEN),
        "weight": (VOCABULARY, HIDDEN),
        "bias": (VOCABULARY,),
        "low": (COUNT, RANK),
        "up": (VOCABULARY, RANK),
    }
    tensors = {name: (1.5 * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}
    return tensors, torch.randint(0, VOCABULARY, (COUNT,))


def fused(given: dict[str, Tensor], target: Tensor, **form: Any) -> Tensor:
    low_rank = [(given["low"], given["up"])] if "low" in given else []
    return linear_cross_entropy(
        given["hidden"],
        given["weight"],
        target,
        bias_V=given.get("bias"),
        low_rank=low_rank,
        chunk_bytes=FOUR_ROWS,
        **form,
    )


def apart(
    given: dict[str, Tensor], target: Tensor, *, smoothing: float = 0, softcap: float | None = None, scale: float = 1
) -> Tensor:
    """The same in torch's own words."""
    logits = given["hidden"] @ given["weight"].T
    if "low" in given:
        logits = logits + given["low"] @ given["up"].T
    if "bias" in given:
        logits = logits + given["bias"]
    logits = scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)


FORMS = [{}, {"smoothing": 0.1}, {"softcap": 3.0}, {"scale": 0.4}, {"smoothing": 0.2, "softcap": 4.0, "scale": 1.7}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "trained", [["hidden"], ["weight"], ["hidden", "weight", "bias"], ["hidden", "low", "up"]], ids="+".join
)
def test_the_gradient_is_the_derivative(trained: list[str], form: dict[str, float]) -> None:
    tensors, target = problem(torch.float64)
    given = {name: tensors[name] for name in dict.fromkeys(["hidden", "weight", *trained])}

    def loss(*moved: Tensor) -> Tensor:
        return fused(given | dict(zip(trained, moved, strict=True)), target, **form)

    assert torch.autograd.gradcheck(loss, [tensors[name].requires_grad_() for name in trained], fast_mode=True)
    torch.testing.assert_close(fused(given, target, **form), apart(given, target, **form))


@pytest.mark.parametrize("form", FORMS)
def test_float32_equals_torchs_own_cross_entropy(form: dict[str, float]) -> None:
    tensors, target = problem(torch.float32)
    for tensor in tensors.values():
        tensor.requires_grad_()
    found, wanted = fused(tensors, target, **form), apart(tensors, target, **form)
    torch.testing.assert_close(found, wanted, rtol=ROUNDING, atol=0)
    ours, theirs = (torch.autograd.grad(3 * loss, list(tensors.values())) for loss in (found, wanted))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= ROUNDING * other.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_within_its_rounding(form: dict[str, float]) -> None:
    tensors, target = problem(torch.bfloat16)
    exact = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.requires_grad_()
    truth, found = apart(exact, target, **form), fused(tensors, target, **form)
    assert found.dtype == torch.float32
    # A logit of about 6, the spread here, rounds by 6 * 2^-9 = 0.01 at most, and each loss is a difference of two.
    assert abs(found.detach() - truth.detach()) <= 0.01 * COUNT
    wanted = torch.autograd.grad(truth, list(exact.values()))
    for one, other in zip(torch.autograd.grad(found, list(tensors.values())), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        # Probabilities err as the logits do, by 0.01 of themselves; they and the sum round by 2^-9 more.
        assert (one - other).norm() <= 0.015 * other.norm()


def test_a_narrow_head_trains_a_wide_weight() -> None:
    """As under autocast: products in bfloat16, and the gradient of the float32 weight is summed in float32."""
    tensors, target = problem(torch.float32)
    weight = tensors["weight"].requires_grad_()
    loss = linear_cross_entropy(tensors["hidden"].bfloat16(), weight, target, chunk_bytes=FOUR_ROWS)
    (found,) = torch.autograd.grad(loss, weight)
    given = {name: tensors[name].bfloat16().double() for name in ("hidden", "weight")}
    given["weight"].requires_grad_()
    (wanted,) = torch.autograd.grad(apart(given, target), given["weight"])
    assert found.dtype == torch.float32
    assert (found - wanted).norm() <= 0.015 * wanted.norm()  # as above


def test_backward_twice_gives_the_same() -> None:
    tensors, target = problem(torch.float32)
    hidden = tensors["hidden"].requires_grad_()
    loss = fused(tensors, target)
    first, second = (torch.autograd.grad(2 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


class Watch(TorchDispatchMode):
    """Counts products, and the most rows of a result as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows, self.products = vocabulary, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(result, Tensor) and result.ndim and result.shape[-1] == self.vocabulary:
            self.rows = max(self.rows, result.numel() // self.vocabulary)
        return result


def test_no_more_logits_than_a_chunk_are_made_or_kept() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 2, requires_grad=True), torch.randn(VOCABULARY, 2)
    target = torch.randint(0, VOCABULARY, (40,))
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with Watch(VOCABULARY) as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = linear_cross_entropy(hidden, weight, target, chunk_bytes=FOUR_ROWS)
        loss.backward()  # type: ignore[no-untyped-call]
    assert watch.rows == 4
    assert saved == [(40, 2)]  # the gradient of the hidden states alone


@pytest.mark.parametrize(
    ("trained", "products"), [([], 1), (["hidden"], 2), (["weight"], 2), (["hidden", "weight"], 3)], ids=str
)
def test_only_the_gradients_that_are_asked_for_cost_a_product(trained: list[str], products: int) -> None:
    """A chunk takes one product for its logits, and one for each gradient."""
    tensors, target = problem(torch.float32)
    given = {name: tensors[name].requires_grad_(name in trained) for name in ("hidden", "weight")}
    with Watch(VOCABULARY) as watch:
        fused(given, target)
    assert watch.products == 3 * products  # three chunks
    with torch.no_grad(), Watch(VOCABULARY) as watch:
        assert not fused(given, target).requires_grad
    assert watch.products == 3


# ---- heads of models


SETTINGS = {"gemma2": {"final_logit_softcapping": 2.0}, "gemma3_text": {"final_logit_softcapping": 3.0}} | {
    "granite": {"logits_scaling": 4.0}
}


def tiny(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
            "use_cache": False,
        }
        | changes,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def batch_of(lengths: list[int], vocabulary: int) -> Batch:
    """Random examples, two of three tokens labelled."""
    torch.manual_seed(1)
    features = []
    for row, length in enumerate(lengths):
        ids = torch.randint(3, vocabulary, (length,), dtype=torch.int32).numpy()
        target = ids.copy()
        target[::3] = IGNORED
        features.append(Features(ids, target, int((target[1:] != IGNORED).sum()), row))
    return collate(features, 0)


def own_loss(model: Any, batch: Batch) -> Tensor:
    """What the model itself says, summed again."""
    mean: Tensor = model(**batch.inputs(), labels=batch.target).loss
    return mean * batch.loss_units


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_a_known_head_gives_the_models_own_loss(kind: str) -> None:
    model, batch = tiny(kind, **SETTINGS.get(kind, {})), batch_of([9, 7, 4], 97)
    assert head_trouble(model) is None
    rule = read_head(model)
    assert rule is not None
    assert (rule.softcap is not None, rule.scale != 1.0) == (kind in SOFTCAPS, kind in {*DIVISORS, *FACTORS})
    compare(model, lambda: LanguageTask().loss(model, batch), lambda: own_loss(model, batch))


def compare(model: nn.Module, ours: Any, theirs: Any, *, rounding: float = ROUNDING) -> None:
    """Same loss, and same gradients of everything that trains, with the same random numbers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    results = []
    for compute in (ours, theirs):
        torch.manual_seed(2)
        loss = compute()
        results.append((loss.detach(), torch.autograd.grad(loss, list(trained.values()), allow_unused=True)))
    (found, gradients), (wanted, expected) = results
    torch.testing.assert_close(found, wanted, rtol=rounding, atol=0)
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for name, one, other in zip(trained, gradients, expected, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype
            assert (one - other).abs().max() <= rounding * largest, name


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: tiny("gpt2"), "gpt2"),
        (lambda: tiny("llama", logits_scaling=2.0), "logits_scaling"),
    ],
)
def test_an_unknown_head_takes_the_models_own_path(model: Any, reason: str) -> None:
    made, batch = model(), batch_of([9, 7, 4], 97)
    assert reason in str(head_trouble(made))
    assert read_head(made) is None
    compare(made, lambda: LanguageTask().loss(made, batch), lambda: own_loss(made, batch))
    assert LanguageTask().predict(made, batch)[0]["tokens"] == 6


def test_a_decoder_inside_a_larger_model_has_a_head_of_its_own() -> None:
    larger = SimpleNamespace(config=AutoConfig.for_model("gemma3"), get_output_embeddings=lambda: nn.Linear(2, 2))
    assert "gemma3 has parts beside" in str(head_trouble(larger))


def test_a_head_that_is_no_linear_layer_is_told() -> None:
    class Other(nn.Linear):
        pass

    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head = Other(32, 97)
    assert "Other" in str(head_trouble(model))


def test_a_model_without_a_vocabulary_is_no_trouble(classify_recipe: Any) -> None:
    model = prepare(classify_recipe(), PlainObserver(), device=torch.device("cpu")).adapted.model
    assert head_trouble(model) is None
    assert read_head(model) is None


# ---- methods


@pytest.fixture(scope="session")
def untied_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny causal model with an output layer of its own."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "untied-llama"
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_llama, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def ready_with(recipe: Any) -> tuple[Any, list[Features], Batch]:
    """A model whose adapters have left their zeros, some features, and their batch."""
    ready = prepare(recipe, PlainObserver(), device=torch.device("cpu"))
    backbone = ready.backbone
    features = ready.task.encode(
        ready.splits.train, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=128
    ).features[:4]
    torch.manual_seed(3)
    for parameter in ready.adapted.trainable().values():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return ready, features, collate(features, backbone.tokenizer.pad_token_id)


HEAD_LORA = {"kind": "peft", "type": "LORA", "target_modules": ["q_proj", "lm_head"], "r": 4, "lora_dropout": 0.3}
HEAD_TRAINED = {"kind": "lora", "rank": 4, "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "prefix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_method_trains_as_on_the_plain_path(method: str, smoothing: float, chat_recipe: Any) -> None:
    ready, _, batch = ready_with(chat_recipe(method=method))
    model, task = ready.adapted.model.train(), ready.task
    head = model.get_output_embeddings()
    compare(
        model,
        lambda: task.loss(model, batch, smoothing=smoothing),
        lambda: task.loss(model, batch, smoothing=smoothing, fused=False),
    )
    assert "forward" not in vars(head)


@pytest.mark.parametrize("method", [HEAD_LORA, HEAD_TRAINED], ids=["lora", "modules_to_save"])
def test_an_adapted_head_trains_as_on_the_plain_path(
    method: dict[str, Any], chat_recipe: Any, untied_llama: Path
) -> None:
    ready, _, batch = ready_with(chat_recipe(f"backbone.name={untied_llama}", method=method))
    model, task = ready.adapted.model.train(), ready.task
    assert any("lm_head" in name for name in ready.adapted.trainable())
    assert head_trouble(model) is None
    compare(model, lambda: task.loss(model, batch), lambda: task.loss(model, batch, fused=False))
    with model.disable_adapter():
        torch.testing.assert_close(task.loss(model, batch), task.loss(model, batch, fused=False), rtol=ROUNDING, atol=0)


def test_dora_on_the_head_is_left_to_peft(chat_recipe: Any, untied_llama: Path) -> None:
    recipe = chat_recipe(f"backbone.name={untied_llama}", method=HEAD_LORA | {"use_dora": True})
    ready, _, batch = ready_with(recipe)
    model = ready.adapted.model.eval()
    assert "more than a product" in str(head_trouble(model))
    assert torch.equal(ready.task.loss(model, batch), ready.task.loss(model, batch, fused=False))


@pytest.mark.parametrize("method", ["full", HEAD_TRAINED, HEAD_LORA], ids=["autocast", "modules_to_save", "lora"])
def test_a_narrow_backbone_trains_as_on_the_plain_path(method: Any, chat_recipe: Any, untied_llama: Path) -> None:
    """Full finetuning computes under autocast; heads and adapters of the others are float32 beside bfloat16."""
    recipe = chat_recipe(f"backbone.name={untied_llama}", "backbone.dtype=bfloat16", method=method)
    ready, _, batch = ready_with(recipe)
    model, task, narrow = ready.adapted.model.train(), ready.task, ready.adapted.autocast
    assert (narrow is None) == (method != "full")

    def loss(*, fused: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow is not None):
            return task.loss(model, batch, fused=fused)

    # Both paths round logits and gradients to 8 bits, 2^-9 of each, at different places and through two layers.
    compare(model, lambda: loss(fused=True), lambda: loss(fused=False), rounding=0.03)


def test_autocast_narrows_the_products() -> None:
    rule = read_head(tiny("llama"))
    assert rule is not None
    torch.manual_seed(0)
    hidden, target = torch.randn(5, 32), torch.randint(0, 97, (5,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rule.loss(hidden, target)
    assert torch.equal(found, linear_cross_entropy(hidden.bfloat16(), rule.linear.weight, target))
    assert not torch.equal(found, rule.loss(hidden, target))


def test_the_models_own_output_layer_does_not_run(chat_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, _, batch = ready_with(chat_recipe())
    model = ready.adapted.model
    calls: list[int] = []
    original = functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(len(weight))
        return original(x, weight, bias)

    monkeypatch.setattr(functional, "linear", counted)
    vocabulary = len(model.get_output_embeddings().weight)
    ready.task.loss(model, batch)
    assert calls
    assert vocabulary not in calls
    ready.task.loss(model, batch, fused=False)
    assert calls.count(vocabulary) == 1


def test_a_forward_that_fails_leaves_the_head_as_it_was(chat_recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ready, _, batch = ready_with(chat_recipe())
    model = ready.adapted.model
    head = model.get_output_embeddings()

    def mine(hidden: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(head, "forward", mine)
    norm = model.base_model.model.model.norm
    monkeypatch.setattr(norm, "forward", lambda hidden: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ready.task.loss(model, batch)
    assert head.forward is mine


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_predictions_are_those_of_the_plain_logits_padded_and_packed(method: str, chat_recipe: Any) -> None:
    ready, features, batch = ready_with(chat_recipe(method=method))
    model = ready.adapted.model.eval()
    with torch.no_grad():
        logits = model(**batch.inputs()).logits[:, -batch.target.shape[1] : -1]  # virtual tokens are in front
    padded = ready.task.predict(model, batch)
    with packed_attention(model, products=True):
        packed = ready.task.predict(model, pack(features))
        together = ready.task.loss(model, pack(features))
    torch.testing.assert_close(together, ready.task.loss(model, batch), rtol=ROUNDING, atol=0)
    for row, (one, other) in enumerate(zip(padded, packed, strict=True)):
        target = batch.target[row, 1:]
        kept = target != IGNORED
        wanted = functional.cross_entropy(logits[row][kept], target[kept], reduction="sum")
        assert one["row"] == other["row"] == features[row].row
        assert one["tokens"] == other["tokens"] == int(kept.sum())
        assert one["loss"] == pytest.approx(float(wanted), rel=ROUNDING)
        assert other["loss"] == pytest.approx(float(wanted), rel=ROUNDING)
        correct = int((logits[row][kept].argmax(-1) == target[kept]).sum())
        assert one["correct"] == other["correct"] == correct


def test_predicting_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama"), batch_of([40, 40, 40], 97)
    whole = LanguageTask().predict(model, batch)
    monkeypatch.setattr("peftkit.kernels.loss.CHUNK_BYTES", {"cpu": 40 * 4 * 97})
    with Watch(97) as watch:
        cut = LanguageTask().predict(model, batch)
    assert batch.loss_units == 3 * 26
    assert watch.rows == 39  # 78 labelled tokens, 40 of them at most: two chunks of like size
    assert [one["loss"] for one in cut] == pytest.approx([one["loss"] for one in whole], rel=ROUNDING)


def test_it_runs_on_tensors_without_storage() -> None:
    with FakeTensorMode():
        model = tiny("llama")
        ids = torch.zeros(2, 9, dtype=torch.long)
        batch = Batch(ids, None, None, ids, torch.full((2,), 9), 16, (0, 1))
        loss = LanguageTask().loss(model, batch, smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.shape == ()
    assert model.lm_head.weight.grad.shape == (97, 32)

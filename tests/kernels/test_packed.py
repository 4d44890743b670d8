"""Examples end to end give what each gives alone, and so do their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from peftkit.data.batching import pack, packs
from peftkit.data.features import IGNORED, Features
from peftkit.kernels import attention, products
from peftkit.kernels.attention import packed_attention
from peftkit.kernels.layouts import DECODERS, ENCODERS
from peftkit.kernels.packed import packing_trouble, real_rows, run_packed
from peftkit.kernels.products import Terms, attend_by_products
from peftkit.kernels.segments import LARGEST, Segments

LENGTHS = [9, 8, 8, 5, 3, 1]
WINDOWED = {"gemma2", "gemma3_text", "mistral"}
ROUNDING = 2e-5
"""Of the largest entry: transformers' own norms and softmax compute in float32 even in a float64 model, which leaves
1e-7 a layer, and a gradient sums it over 34 tokens."""


def tokens() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 90, (length,)) for length in LENGTHS]


def tiny(kind: str, **changes: Any) -> Any:
    return AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "initializer_range": 0.3,
        }
        | changes,
    )


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(model: torch.nn.Module, wanted: dict[str, Tensor]) -> None:
    found = gradients(model)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= ROUNDING * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize(("products", "longest"), [(True, 9), (True, 6), (False, 9)], ids=["products", "both", "fused"])
@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_a_decoder_packed_equals_each_example_alone(
    kind: str, products: bool, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.LONGEST_PRODUCT, 8, longest)
    window = {"sliding_window": 4} if kind in WINDOWED else {}
    config = tiny(kind, num_key_value_heads=2, head_dim=8, **window)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().train()
    alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in tokens()])
    alone.square().sum().backward()
    wanted = gradients(model)
    with packed_attention(model, products=products):
        packed = run_packed(model, torch.cat(tokens())[None], Segments.of(LENGTHS))[0]
        packed.square().sum().backward()
    assert (packed - alone).abs().max() <= ROUNDING * alone.abs().max()
    assert_same_gradients(model, wanted)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3"])
def test_queries_that_a_norm_left_wide_are_attended_to_in_the_dtype_of_the_values(kind: str, products: bool) -> None:
    """Under autocast, as with full finetuning in bfloat16: norms that train give float32, linear layers bfloat16."""
    torch.manual_seed(0)
    config = tiny(kind, num_key_value_heads=2, head_dim=8, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in tokens()])
    alone.square().sum().backward()
    wanted = gradients(model)
    with packed_attention(model, products=products), torch.autocast("cpu", dtype=torch.bfloat16):
        packed = run_packed(model, torch.cat(tokens())[None], Segments.of(LENGTHS))[0]
    with packed_attention(model, products=products):
        packed.square().sum().backward()
    found = gradients(model)
    assert set(found) == set(wanted)
    distance = sum(float((found[name] - gradient).square().sum()) for name, gradient in wanted.items())
    length = sum(float(gradient.square().sum()) for gradient in wanted.values())
    assert distance <= 0.05**2 * length  # bfloat16 keeps 8 bits, and three layers add their roundings up


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_an_encoder_packed_equals_each_example_alone(kind: str) -> None:
    config = tiny(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, embedding_size=32)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").double().train()
    alone = torch.cat([model(input_ids=ids[None]).logits for ids in tokens()])
    alone.square().sum().backward()
    wanted = gradients(model)
    with packed_attention(model):
        packed = run_packed(model, torch.cat(tokens())[None], Segments.of(LENGTHS))
        packed.square().sum().backward()
    assert (packed - alone).abs().max() <= ROUNDING * alone.abs().max()
    assert_same_gradients(model, wanted)


def adapters(task: TaskType) -> dict[str, Any]:
    return {
        "lora": LoraConfig(task_type=task, target_modules="all-linear", init_lora_weights=False),
        "prefix": PrefixTuningConfig(task_type=task, num_virtual_tokens=5),
        "prompt": PromptTuningConfig(task_type=task, num_virtual_tokens=5),
    }


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_an_adapted_decoder_packed_equals_each_example_alone(name: str, tiny_llama: Path) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = get_peft_model(base, adapters(TaskType.CAUSAL_LM)[name]).double().train()
    alone = torch.cat([model(input_ids=ids[None]).logits[0, -len(ids) :] for ids in tokens()])
    alone.square().sum().backward()
    wanted = gradients(model)
    with packed_attention(model):
        found = run_packed(model, torch.cat(tokens())[None], Segments.of(LENGTHS))
        packed = real_rows(found, LENGTHS)[0]
        packed.square().sum().backward()
    assert (packed - alone).abs().max() <= ROUNDING * alone.abs().max()
    assert_same_gradients(model, wanted)


@pytest.mark.parametrize("name", ["lora", "prefix", "prompt"])
def test_an_adapted_encoder_packed_equals_each_example_alone(name: str, tiny_bert: Path) -> None:
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3, **still)
    model = get_peft_model(base, adapters(TaskType.SEQ_CLS)[name]).double().train()
    alone = torch.cat(
        [model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits for ids in tokens()]
    )
    alone.square().sum().backward()
    wanted = gradients(model)
    with packed_attention(model):
        packed = run_packed(model, torch.cat(tokens())[None], Segments.of(LENGTHS))
        packed.square().sum().backward()
    assert (packed - alone).abs().max() <= ROUNDING * alone.abs().max()
    assert_same_gradients(model, wanted)


def test_prefix_tuning_recomputes_its_layers(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config).train()
    segments, ids = Segments.of(LENGTHS), torch.cat(tokens())[None]

    def gradient() -> Tensor:
        with packed_attention(model):
            run_packed(model, ids, segments).square().sum().backward()
        return gradients(model)["prompt_encoder.default.embedding.weight"]

    kept = gradient()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    calls: list[int] = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.allclose(gradient(), kept, rtol=1e-5, atol=1e-6 * float(kept.abs().max()))
    assert len(calls) == 2  # once forward, once again in the backward pass


@pytest.mark.parametrize("longest_kept", [128, 3], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("terms", "virtual"),
    [
        (Terms(0.3, causal=True), 0),
        (Terms(0.3, causal=True), 3),
        (Terms(0.3, causal=False), 2),
        (Terms(0.3, causal=True, window=3), 0),
        (Terms(0.3, causal=True, softcap=2.0), 0),
    ],
)
def test_the_gradient_of_attention_is_its_derivative(
    terms: Terms, virtual: int, longest_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LONGEST_KEPT", longest_kept)
    torch.manual_seed(0)
    segments = Segments.of([4, 4, 3, 1])

    def random(heads: int, rows: int) -> Tensor:
        return torch.randn(1, heads, rows, 2, dtype=torch.float64, requires_grad=True)

    front = (random(2, virtual), random(2, virtual)) if virtual else ()

    def attended(query: Tensor, key: Tensor, value: Tensor, *before: Tensor) -> Tensor:
        return attend_by_products(query, key, value, segments, terms, front=before or None)

    assert torch.autograd.gradcheck(attended, (random(4, 12), random(2, 12), random(2, 12), *front))


def test_dropped_scores_are_the_same_in_the_backward_pass() -> None:
    segments, terms = Segments.of([4, 3]), Terms(0.5, causal=False)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def dropping(*states: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attend_by_products(*states, segments, terms, dropout=0.4)

    assert torch.autograd.gradcheck(dropping, inputs)
    whole = attend_by_products(*inputs, segments, terms)
    assert (dropping(*inputs) - whole).abs().max() > 0.01


def test_an_unknown_architecture_keeps_its_padding() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    assert "gpt2" in str(packing_trouble(model, attention="auto"))


def test_the_users_own_attention_keeps_its_padding(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert packing_trouble(model, attention="auto") is None
    assert "eager" in str(packing_trouble(model, attention="eager"))


def test_groups_hold_all_rows_in_order_within_the_largest_product() -> None:
    lengths = [700, 300, 299, 290, 40, 39, 10, 1, 1]
    segments = Segments.of(lengths)
    states = torch.arange(sum(lengths) * 6).view(1, -1, 2, 3).transpose(1, 2)
    blocks = segments.blocks(2)
    assert torch.equal(blocks.collect(blocks.gather(states))[None].transpose(1, 2), states)
    assert all(g.examples == 1 or g.examples * g.longest**2 <= LARGEST for g in segments.groups)
    assert [g.examples for g in segments.groups] == [1, 2, 1, 2, 1, 2]
    assert segments.positions()[0, :701].tolist() == [*range(700), 0]


def test_the_groups_of_a_split_count_from_their_own_first_row() -> None:
    first, rest = Segments.of([700, 300, 299, 40, 10]).split(2)
    assert (first.lengths, rest.lengths) == ((700, 300, 299), (40, 10))
    assert (first.bounds.tolist(), rest.bounds.tolist()) == ([0, 700, 1000, 1299], [0, 40, 50])
    assert [(group.start, group.stop) for group in (*first.groups, *rest.groups)] == [
        *((0, 700), (700, 1299), (0, 40), (40, 50))
    ]


def features(lengths: list[int]) -> list[Features]:
    ids = [torch.arange(length).numpy().astype("int32") for length in lengths]
    return [Features(row_ids, row_ids, len(row_ids) - 1, row) for row, row_ids in enumerate(ids)]


def test_a_packed_batch_never_predicts_across_examples() -> None:
    batch = pack(features([3, 2]))
    assert batch.input_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.target.tolist() == [[IGNORED, 1, 2, IGNORED, 1]]
    assert int((batch.target != IGNORED).sum()) == batch.loss_units == 3


def test_packs_are_few_even_and_within_the_budget() -> None:
    given = features([50, 10, 30, 20, 40, 60])
    found = [[len(feature) for feature in group] for group in packs(given, max_tokens=120)]
    assert found == [[60, 50], [40, 30, 20, 10]]
    assert [len(group) for group in packs(given, max_examples=4)] == [4, 2]
    assert [[len(f) for f in group] for group in packs(given, max_tokens=45)] == [[60], [50], [40], [30], [20, 10]]

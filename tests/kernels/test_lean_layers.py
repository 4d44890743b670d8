"""Lean layers compute what a model's own layers compute, keep less, and leave the model and its class as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from peftkit.kernels.layers import FAMILIES, Leaned, gated, lean_layers, restore_layers, rms_norm, rotate
from peftkit.kernels.layouts import DECODERS

ROUNDING = 3e-5
"""Of the largest entry: float32 resolves 1.2e-7, and a gradient of three layers passes a few hundred roundings."""
LAYERS = 3


def tiny(kind: str, **changes: Any) -> Any:
    """A configuration of three layers with grouped-query attention."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    tokens = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, **(sizes | heads | tokens | {"initializer_range": 0.3} | changes))


def decoder(kind: str, **changes: Any) -> Any:
    """A model of random weights, its norms' too, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(kind, **changes)).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def tokens() -> Tensor:
    return torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def run(model: Any) -> tuple[Tensor, Tensor]:
    """Logits, and all gradients in one vector."""
    model.zero_grad()
    torch.manual_seed(4)
    logits = model(input_ids=tokens()).logits
    logits.float().square().mean().backward()
    return logits.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def of_kind(model: nn.Module, ending: str) -> int:
    return sum(type(module).__name__.endswith(ending) for module in model.modules())


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_every_known_decoder_gives_the_same_logits_and_gradients(kind: str) -> None:
    model = decoder(kind)
    wanted = run(model)
    leaned = lean_layers(model)
    assert leaned == Leaned(0, of_kind(model, "RMSNorm"), LAYERS, LAYERS)
    assert leaned.norms >= 2 * LAYERS + 1
    for found, plain in zip(run(model), wanted, strict=True):
        assert not torch.equal(found, plain)  # else the lean forwards did not run
        assert distance(found, plain) < ROUNDING


@pytest.mark.parametrize("kind", sorted(DECODERS))
def test_in_bfloat16_it_errs_no_more_than_the_plain_model(kind: str) -> None:
    model = decoder(kind).to(torch.bfloat16)
    exact = run(copy.deepcopy(model).double())
    plain = run(model)
    lean_layers(model)
    for found, before, wanted in zip(run(model), plain, exact, strict=True):
        # two draws of the same rounding error: 6 seeds of each decoder gave ratios from 0.67 to 1.45
        assert (found - wanted).norm() < 2 * (before - wanted).norm()


def test_under_autocast_it_errs_no_more_than_the_plain_model() -> None:
    model = decoder("llama")
    exact = run(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model)
        lean_layers(model)
        lean = run(model)
    for found, before, wanted in zip(lean, plain, exact, strict=True):
        assert (found - wanted).norm() < 2 * (before - wanted).norm()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3"])
def test_evaluation_and_generation_are_the_same(kind: str) -> None:
    model = decoder(kind).eval()
    with torch.no_grad():
        wanted = model(input_ids=tokens()).logits
        written = model.generate(tokens(), max_new_tokens=6, do_sample=False)
        lean_layers(model)
        assert distance(model(input_ids=tokens()).logits, wanted) < ROUNDING
        assert torch.equal(model.generate(tokens(), max_new_tokens=6, do_sample=False), written)


def test_restoring_gives_the_plain_model_back() -> None:
    model = decoder("llama")
    logits, gradients = run(model)
    lean_layers(model)
    restore_layers(model)
    again = run(model)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], gradients)
    assert not any("forward" in vars(module) for module in model.modules())


def test_names_and_other_models_of_the_class_stay_as_they_were() -> None:
    model, other, function = decoder("llama"), decoder("llama"), modeling_llama.apply_rotary_pos_emb
    names, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    plain = run(other)[0]
    lean_layers(model)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == modules
    assert modeling_llama.apply_rotary_pos_emb is function
    assert torch.equal(run(other)[0], plain)


def test_a_copy_of_a_lean_model_computes_with_its_own_weights() -> None:
    model = decoder("llama")
    lean_layers(model)
    wanted = run(model)[0]
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(run(twin)[0], wanted)


def test_a_second_call_changes_nothing() -> None:
    model = decoder("llama")
    assert lean_layers(model) == lean_layers(model)


def test_what_is_not_known_is_left() -> None:
    class LlamaRMSNorm(nn.Module):
        """Known by its name, and not from transformers."""

    replaced = modeling_llama.LlamaRMSNorm(8)
    replaced.forward = lambda x: x
    relu = decoder("llama", hidden_act="relu").model.layers[0].mlp
    model = nn.ModuleList([LlamaRMSNorm(), replaced, relu, nn.Dropout(0.0), nn.Dropout(0.5, inplace=True)])
    assert lean_layers(model) == Leaned(0, 0, 0, 0)
    assert replaced.forward(3) == 3


def test_the_counts_are_said_in_words() -> None:
    leaned = lean_layers(decoder("phi3", resid_pdrop=0.1))
    assert str(leaned) == "6 dropouts, 7 norms, 3 gated units, 3 rotary embeddings run lean"


def test_half_rotated_heads_keep_their_own_rotation() -> None:
    model = decoder("phi3", partial_rotary_factor=0.5)
    wanted = run(model)[0]
    lean_layers(model)
    assert distance(run(model)[0], wanted) < ROUNDING


def test_dropout_in_a_lean_encoder_drops_in_training_only() -> None:
    config = AutoConfig.for_model("bert", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager")
    plain = model.eval()(input_ids=tokens()).last_hidden_state
    # one behind the embeddings; in each layer behind attention, behind the unit, and one that only holds a number
    assert lean_layers(model).dropouts == 1 + 3 * 2
    assert torch.equal(model(input_ids=tokens()).last_hidden_state, plain)
    model.train()
    torch.manual_seed(0)
    lean = model(input_ids=tokens()).last_hidden_state
    assert not torch.allclose(lean, plain, atol=0.1)
    torch.manual_seed(0)
    assert torch.equal(model(input_ids=tokens()).last_hidden_state, lean)


def test_checkpointed_layers_give_the_same_gradients_under_dropout() -> None:
    model = decoder("phi3", resid_pdrop=0.3)
    lean_layers(model)
    wanted = run(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = run(model)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_a_lean_model_trains_on_fake_tensors() -> None:
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(tiny("phi3", resid_pdrop=0.1)).train()
        lean_layers(model)
        model(input_ids=torch.ones(2, 11, dtype=torch.long)).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Olmo2"])
def test_the_norms_gradient_is_its_derivative(family: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight_H = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, w: rms_norm(x, w, epsilon=1e-2, norm=FAMILIES[family]), (x, weight_H))
    assert gradcheck(lambda x: rms_norm(x, weight_H.detach(), epsilon=1e-2, norm=FAMILIES[family]), (x,))
    assert gradcheck(lambda w: rms_norm(x.detach(), w, epsilon=1e-2, norm=FAMILIES[family]), (weight_H,))


@pytest.mark.parametrize("gelu", [False, True])
def test_the_gated_units_gradient_is_its_derivative(gelu: bool) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda g, u: gated(g, u, gelu=gelu), (gate, up))
    assert gradcheck(lambda u: gated(gate.detach(), u, gelu=gelu), (up,))
    assert gradcheck(lambda g: gated(g, up.detach(), gelu=gelu), (gate,))
    activated = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
    assert torch.equal(gated(gate, up, gelu=gelu), activated * up)


def test_the_rotations_gradient_is_its_derivative() -> None:
    torch.manual_seed(0)
    x_ATD = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(2, 1, 4, 6, dtype=torch.float64)
    assert gradcheck(lambda x: rotate(x, angles.cos(), angles.sin()), (x_ATD,))


def kept_bytes(call: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of the tensors that a call saves for the backward pass, each storage once and parameters left out."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert result.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("cls", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_keeps_its_input_and_one_number_a_row(cls: Any, trained: bool) -> None:
    rows, features = 10, 64
    norm = cls(features).to(torch.bfloat16).requires_grad_(trained)
    x = torch.randn(rows, features, dtype=torch.bfloat16, requires_grad=True)
    plain = kept_bytes(lambda: norm(x), [norm.weight])
    lean_layers(norm)
    assert kept_bytes(lambda: norm(x), [norm.weight]) == 2 * rows * features + 4 * rows
    # plain: a float32 copy of the input at least
    assert plain >= 4 * rows * features


def test_a_gated_unit_keeps_two_tensors_where_plain_keeps_three() -> None:
    rows, inner = 10, 48
    unit = LlamaMLP(tiny("llama"))
    unit.requires_grad_(False)
    x = torch.randn(rows, 32, requires_grad=True)
    weights = list(unit.parameters())
    assert kept_bytes(lambda: unit(x), weights) == 3 * 4 * rows * inner
    lean_layers(unit)
    assert kept_bytes(lambda: unit(x), weights) == 2 * 4 * rows * inner

"""LoRA layers in one operation give what PEFT's own give: outputs, gradients, files."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, BertModel, BitsAndBytesConfig

from peftkit.kernels import lora, lora_linear
from peftkit.kernels.lora import Fused, fuse_lora, unfuse_lora
from peftkit.kernels.lora_linear import Term

ROUNDINGS = 512
"""Sums of at most 64 terms in eight products one after another, in another order: so many roundings at most."""
TOKENS = torch.arange(1, 22).view(3, 7)
Build = Callable[..., Any]


def closeness(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a part of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def adapt(model: Any, **settings: Any) -> Any:
    """A PEFT model whose updates are not zero: rank 4 in all linear layers unless `settings` say otherwise."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.fixture
def build(tiny_llama: Path, tiny_bert: Path) -> Build:
    def build(kind: str = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        if kind == "llama":
            return adapt(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype), **settings)
        return adapt(BertModel.from_pretrained(tiny_bert, dtype=dtype), **settings)

    return build


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each operation served, in the order of the calls."""
    served: list[int] = []

    def counted(x: Tensor, terms: Sequence[Term]) -> list[Tensor]:
        served.append(len(terms))
        return lora_linear.lora_linear(x, terms)

    monkeypatch.setattr(lora, "lora_linear", counted)
    return served


def outcome(model: Any, embedded: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients of everything that trains, and the gradient of the embedded tokens."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(TOKENS) if embedded is None else embedded
    embedded = embedded.detach().requires_grad_()
    output = model(inputs_embeds=embedded)[0]
    # not the mean of squares, which the last norm of an encoder has made a constant: its gradient is all rounding
    (output.float() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert embedded.grad is not None
    return {"output": output.detach(), "input": embedded.grad} | gradients


def assert_equal_outcomes(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    differences = {name: difference(found[name], expected[name]) for name in expected}
    assert max(differences.values()) <= tolerance, differences


@pytest.mark.parametrize("dropout", [False, True], ids=["all", "dropped"])
@pytest.mark.parametrize("input_trains", [True, False], ids=["inner", "lowest"])
def test_gradients_of_a_group_are_those_of_its_formula(dropout: bool, input_trains: bool) -> None:
    torch.manual_seed(0)
    shapes, scales = ((5, 2), (3, 1), (4, 3)), (2.0, 0.5, -1.5)  # outputs and rank of each layer
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=input_trains)
    weights = [torch.randn(outs, 6, dtype=torch.float64) for outs, _ in shapes]
    masks = [torch.rand(6, 6) < 0.7 if dropout else None for _ in shapes]
    factors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for outs, rank in shapes
        for shape in ((outs,), (rank, 6), (outs, rank))
    ]

    def fused(x: Tensor, *factors: Tensor) -> list[Tensor]:
        parts = zip(weights, factors[0::3], factors[1::3], factors[2::3], scales, masks, strict=True)
        return lora_linear.lora_linear(x, [Term(*part, kept=0.7 if dropout else 1.0) for part in parts])

    def formula(x: Tensor, *factors: Tensor) -> list[Tensor]:
        outputs = []
        for i, (weight, scale, mask) in enumerate(zip(weights, scales, masks, strict=True)):
            bias, down, up = factors[3 * i : 3 * i + 3]
            seen = x if mask is None else x * mask.view(x.shape) / 0.7
            outputs.append(x @ weight.T + bias + scale * (seen @ down.T @ up.T))
        return outputs

    for found, expected in zip(fused(x, *factors), formula(x, *factors), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(fused, (x, *factors))


def test_an_output_that_is_not_used_asks_for_no_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    terms = [Term(torch.randn(2, 4), None, torch.randn(1, 4).requires_grad_(), torch.ones(2, 1), 1.0) for _ in range(2)]
    used, _ = lora_linear.lora_linear(x, terms)
    used.sum().backward()
    assert terms[0].down.grad is not None
    assert terms[1].down.grad is None or not terms[1].down.grad.any()
    expected = torch.ones(3, 2) @ (terms[0].weight + terms[0].up @ terms[0].down)
    torch.testing.assert_close(x.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "fused", "served"),
    [("llama", Fused(14, 4, {}), [3, 1, 2, 1] * 2), ("bert", Fused(13, 2, {}), [3, 1, 1, 1] * 2 + [1])],
)
def test_a_fused_model_equals_peft(
    kind: str, fused: Fused, served: list[int], dtype: torch.dtype, build: Build, operations: list[int]
) -> None:
    model = build(kind, dtype=dtype)
    plain = outcome(model)
    assert not operations
    assert fuse_lora(model) == fused
    assert_equal_outcomes(outcome(model), plain, closeness(dtype))
    assert operations == served
    unfuse_lora(model)
    assert_equal_outcomes(outcome(model), plain, 0.0)
    assert operations == served


@pytest.mark.parametrize(
    ("kind", "settings", "served"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}, [2, 2]),
        ("llama", {"target_modules": ["k_proj", "down_proj"]}, [1, 1] * 2),
        ("llama", {"use_rslora": True}, [3, 1, 2, 1] * 2),
        ("llama", {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}, [3, 1, 2, 1] * 2),
        ("bert", {"bias": "lora_only", "target_modules": ["query", "value", "dense"]}, [2, 1, 1, 1] * 2 + [1]),
    ],
)
def test_layers_keep_their_own_ranks_scales_and_biases(
    kind: str, settings: dict[str, Any], served: list[int], build: Build, operations: list[int]
) -> None:
    model = build(kind, **settings)
    plain = outcome(model)
    fuse_lora(model)
    assert_equal_outcomes(outcome(model), plain, closeness(torch.float32))
    assert operations == served


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_backbone_rounds_less_than_with_peft(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["linear"], init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.ModuleDict({"linear": nn.Linear(256, 192)}).to(dtype))
    layer = model["linear"]
    layer.lora_A.float()
    layer.lora_B.float()
    layer.lora_B["default"].weight.data *= 0.1  # the update is then about a tenth of the output
    x, dy = torch.randn(100, 256, dtype=dtype), torch.randn(100, 192, dtype=dtype)

    def results(layer: Any, dtype: torch.dtype) -> list[Tensor]:
        seen = x.to(dtype, copy=True).requires_grad_()
        y = layer(seen)
        y.backward(dy.to(dtype))
        factors = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        found = [y.detach(), seen.grad, *factors]
        layer.zero_grad()
        assert [tensor.dtype for tensor in found] == [dtype, dtype, *(factor.dtype for factor in factors)]
        return found

    exact = results(copy.deepcopy(layer).double(), torch.float64)
    plain = results(layer, dtype)
    fuse_lora(model)
    fused = results(layer, dtype)
    assert fused[2].dtype == torch.float32

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]

    for own, peft in zip(errors(fused)[:2], errors(plain)[:2], strict=True):
        assert own <= peft  # base and update are rounded as one sum, by PEFT one after the other
    # A and B, the narrow product of two, and the gradient itself are rounded once each, by half an eps at most
    assert max(errors(fused)[2:]) <= 1.5 * torch.finfo(dtype).eps


def test_an_update_too_small_for_the_grid_of_the_outputs_still_counts() -> None:
    torch.manual_seed(0)
    inputs, outputs, tokens = 256, 128, 512
    ulp, update = 2.0**-6, 2.0**-11  # outputs lie between 2 and 4, a base of 3 and a fifth of noise
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16)
    x[:, 0] = 1
    base = nn.Linear(inputs, outputs, bias=False)
    base.weight.data *= 0.2 / base.weight.data.norm(dim=1, keepdim=True)
    base.weight.data[:, 0] = 3
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["linear"])
    model = inject_adapter_in_model(config, nn.ModuleDict({"linear": base.bfloat16()}))
    layer = model["linear"]
    layer.lora_A.float()
    layer.lora_B.float()
    layer.lora_A["default"].weight.data = torch.eye(1, inputs)
    layer.lora_B["default"].weight.data.fill_(update)

    def moved() -> float:
        with torch.no_grad():
            return float((layer(x) - base(x)).double().mean() / update)

    assert moved() == 0, "PEFT adds an update of a thirty-second of an ulp to outputs that are rounded already"
    fuse_lora(model)
    # one output in so many moves, by an ulp: the deviation of the mean
    assert moved() == pytest.approx(1, abs=5 * (ulp / update / (tokens * outputs)) ** 0.5)


def test_an_nf4_backbone_equals_peft(tiny_llama: Path, operations: list[int]) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings, dtype=torch.float32))
    plain = outcome(model)
    assert fuse_lora(model) == Fused(14, 4, {})
    assert_equal_outcomes(outcome(model), plain, closeness(torch.float32))
    assert operations == [3, 1, 2, 1] * 2


def test_a_quantized_layer_that_computes_in_another_dtype_runs_as_peft_runs_it(
    tiny_llama: Path, operations: list[int]
) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = adapt(
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=settings, dtype=torch.float32),
        target_modules=["o_proj"],
    )
    plain = outcome(model)
    fuse_lora(model)
    assert_equal_outcomes(outcome(model), plain, 0.0)
    assert not operations


class Attention(nn.Module):
    """Three layers of the table that are given two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mixed: Tensor = self.query(x) * self.key(memory) + self.value(memory)
        return mixed


@pytest.fixture
def attention() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "key", "value"], lora_dropout=0.25, init_lora_weights=False)
    return inject_adapter_in_model(config, Attention())


def test_each_layer_drops_its_own_inputs_and_the_same_again_backward(
    attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []

    def recorded(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
        assert p == 0.25
        masks.append(torch.rand(tuple(shape)) >= p)
        return masks[-1]

    monkeypatch.setattr(lora, "keep_mask", recorded)
    plain = copy.deepcopy(attention)
    fuse_lora(attention)
    x = torch.randn(2, 5, 8, requires_grad=True)
    attention(x, x).square().sum().backward()
    assert len(masks) == 3
    assert not torch.equal(masks[0], masks[1])
    for layer, mask in zip((plain.query, plain.key, plain.value), masks, strict=True):
        layer.lora_dropout["default"].register_forward_hook(
            lambda _, given, __, m=mask: given[0] * m.view(2, 5, 8) / 0.75
        )
    y = x.detach().requires_grad_()
    plain(y, y).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert difference(x.grad, y.grad) <= closeness(torch.float32)
    for found, expected in zip(attention.parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        if found.grad is not None and expected.grad is not None:
            assert difference(found.grad, expected.grad) <= closeness(torch.float32)


def test_dropout_leaves_the_mean_output_and_stops_in_evaluation(attention: Any) -> None:
    x = torch.randn(4, 8)
    plain = attention.eval().query(x)
    fuse_lora(attention)
    torch.testing.assert_close(attention.query(x), plain)
    attention.train()
    draws = torch.stack([attention.query(x).detach() for _ in range(600)])
    # five standard errors of the mean, for each of 32 outputs
    assert ((draws.mean(0) - plain).abs() <= 5 * draws.std(0) / 600**0.5).all()
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_blocks_give_the_same_gradients_and_still_share(
    dropout: float, build: Build, operations: list[int]
) -> None:
    model = build(lora_dropout=dropout).train()
    fuse_lora(model)
    torch.manual_seed(3)
    kept = outcome(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    assert_equal_outcomes(outcome(model), kept, 0.0)
    forward = [3, 1, 2, 1]
    # blocks in order, blocks in order, then each again, the last one first
    assert operations == forward * 2 + forward * 2 + forward * 2


def saved_bytes(run: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside and every storage once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in known)


def test_a_group_keeps_its_input_once(attention: Any) -> None:
    N, K, R = 50, 8, 2
    x = torch.randn(N, K, requires_grad=True)
    dropped = lambda: attention.query(x) + attention.key(x) + attention.value(x)  # noqa: E731
    plain = saved_bytes(dropped, list(attention.parameters()))
    fuse_lora(attention)
    fused = saved_bytes(dropped, list(attention.parameters()))
    assert fused == 4 * N * K + 3 * N * K + 3 * 4 * N * R  # x; three masks of a byte; three x A^T
    assert plain >= 3 * (4 * N * K + 4 * N * R) + 3 * N * K  # what each layer's dropout left, and so on

    narrow = attention.bfloat16()
    for layer in (narrow.query, narrow.key, narrow.value):
        layer.lora_dropout["default"] = nn.Identity()
        layer.lora_A.float()
        layer.lora_B.float()
    x = torch.randn(N, K, requires_grad=True, dtype=torch.bfloat16)
    fused = saved_bytes(dropped, list(narrow.parameters()))
    unfuse_lora(narrow)
    plain = saved_bytes(dropped, list(narrow.parameters()))
    assert fused == 2 * N * K + 3 * 2 * N * R
    assert plain == 3 * (4 * N * K + 4 * N * R)  # a float32 copy of x for every layer


def test_nothing_waits_after_a_pass(attention: Any) -> None:
    fuse_lora(attention)

    def given(call: Callable[[Tensor], object]) -> weakref.ref[Tensor]:
        x = torch.randn(3, 8)
        call(x)
        return weakref.ref(x)

    assert given(lambda x: attention(x, x))() is None
    broken_off = given(attention.query)
    assert broken_off() is not None  # key and value may yet come
    attention.query.enable_adapters(False)
    attention.query(torch.randn(3, 8))
    assert broken_off() is None


def test_siblings_with_different_inputs_part_for_good(attention: Any, operations: list[int]) -> None:
    attention.eval()
    x, memory = torch.randn(3, 8), torch.randn(3, 8)
    plain = attention(x, memory)
    assert fuse_lora(attention) == Fused(3, 1, {})
    for _ in range(2):
        torch.testing.assert_close(attention(x, memory), plain)
    assert operations == [3, 1, 1, 1, 1, 1]


def test_the_order_of_the_siblings_does_not_matter(attention: Any, operations: list[int]) -> None:
    attention.eval()
    x = torch.randn(3, 8)
    plain = {name: attention.get_submodule(name)(x) for name in ("value", "query", "key")}
    fuse_lora(attention)
    for name, expected in plain.items():
        torch.testing.assert_close(attention.get_submodule(name)(x), expected)
    torch.testing.assert_close(attention.query(x), plain["query"])
    torch.testing.assert_close(attention.query(x), plain["query"])
    assert operations == [3, 3, 1]


@pytest.fixture
def trained(build: Build) -> Any:
    """A fused model after one step."""
    model = build(target_modules=["q_proj", "k_proj", "v_proj", "up_proj"])
    fuse_lora(model)
    outcome(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad.sign() * 0.01
    return model


def answers(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(TOKENS).logits
    return logits


def test_names_and_files_stay_those_of_peft(
    trained: Any, tiny_llama: Path, tmp_path: Path, operations: list[int]
) -> None:
    expected = answers(trained)
    assert operations == [3, 1] * 2
    names = list(trained.state_dict())
    trained.save_pretrained(tmp_path / "fused")
    unfuse_lora(trained)
    assert list(trained.state_dict()) == names
    trained.save_pretrained(tmp_path / "plain")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "fused")
    assert difference(answers(loaded), expected) <= closeness(torch.float32)


def test_disabled_adapters_leave_the_backbone(trained: Any, tiny_llama: Path, operations: list[int]) -> None:
    adapted = answers(trained)
    with trained.disable_adapter():
        bare = answers(trained)
    assert operations == [3, 1] * 2
    assert torch.equal(bare, answers(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    assert torch.equal(answers(trained), adapted)
    assert difference(adapted, bare) > 0.01


def test_merged_weights_answer_as_the_fused_layers(trained: Any, operations: list[int]) -> None:
    expected = answers(trained)
    trained.merge_adapter()
    assert difference(answers(trained), expected) <= closeness(torch.float32)
    trained.unmerge_adapter()
    assert operations == [3, 1] * 2
    merged = trained.merge_and_unload()
    assert not any("forward" in vars(module) for module in merged.modules())
    assert difference(answers(merged), expected) <= closeness(torch.float32)


@pytest.mark.parametrize("state", ["mixed", "two", "autocast", "hooked", "trained-base"])
def test_what_the_formula_does_not_cover_runs_as_peft_runs_it(state: str, build: Build, operations: list[int]) -> None:
    model = build(target_modules=["q_proj", "v_proj"]).eval()
    arguments: dict[str, Any] = {}
    calls: list[str] = []
    match state:
        case "mixed":
            arguments = {"adapter_names": ["default", "__base__", "default"]}
        case "two":
            model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
            model.base_model.set_adapter(["default", "other"])
        case "hooked":
            for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
                layer.base_layer.register_forward_hook(lambda *_: calls.append("base"))
        case "trained-base":
            for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
                layer.base_layer.weight.requires_grad_()

    def logits() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast"):
            return model(TOKENS, **arguments).logits  # type: ignore[no-any-return]

    fuse_lora(model)
    fused = logits()
    assert not operations
    assert len(calls) == (4 if state == "hooked" else 0)
    unfuse_lora(model)
    assert torch.equal(fused, logits())


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"use_dora": True}, "its update is a DoraLinearVariant"),
        ({"lora_bias": True}, "its update has a bias"),
    ],
)
def test_other_updates_are_left_to_peft_with_the_reason(settings: dict[str, Any], left: str, build: Build) -> None:
    model = build("bert", target_modules=["query"], **settings)
    plain = outcome(model)
    assert fuse_lora(model) == Fused(0, 0, {left: 2})
    assert str(fuse_lora(model)).endswith(f"2 left to PEFT: {left}")
    assert_equal_outcomes(outcome(model), plain, 0.0)


def test_other_layers_are_left_to_peft_by_name() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(4, 8), "v_proj": nn.Linear(8, 8)})
    adapted = inject_adapter_in_model(LoraConfig(target_modules=["tokens", "v_proj"]), model)
    assert fuse_lora(adapted) == Fused(1, 0, {"Embedding over Embedding": 1})
    assert fuse_lora(nn.Linear(2, 2)) == Fused(0, 0, {})


def test_a_copy_of_a_fused_model_stands_alone(attention: Any) -> None:
    x = torch.randn(3, 8)
    fuse_lora(attention.eval())
    before = attention(x, x)
    twin = copy.deepcopy(attention)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
    assert torch.equal(twin(x, x), before)


def test_a_fused_layer_runs_on_fake_tensors(attention: Any) -> None:
    fuse_lora(attention)
    mode = FakeTensorMode()
    for module in attention.modules():
        for name, own in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(mode.from_tensor(own.detach()), own.requires_grad))
    with mode:
        x = torch.empty(2, 5, 8, requires_grad=True)
        y = attention(x, x)
        y.sum().backward()
    assert y.shape == (2, 5, 8)
    gradients = [parameter.grad for parameter in attention.parameters() if parameter.requires_grad]
    assert [type(gradient) for gradient in gradients] == [FakeTensor] * 6

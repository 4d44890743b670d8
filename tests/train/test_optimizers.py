"""Optimizers: updates finer than bfloat16 holds, steps within the backward pass, and eight-bit moments."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftkit.backbones.load import load_backbone
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.errors import InputError, MethodError
from peftkit.methods.full import Full
from peftkit.recipe import Training
from peftkit.train import lowprecision
from peftkit.train.checkpoint import load_checkpoint, save_checkpoint
from peftkit.train.lowprecision import Rounding, RoundingAdamW, join, round_stochastically, split
from peftkit.train.optimizers import Updates, build_optimizer, open_updates

LABELS = Head("classification", ("bad", "good"), "single_label_classification")


def settings(**changes: Any) -> Training:
    return Training.model_validate({"learning_rate": 1e-3, "weight_decay": 0.1, "clip": None} | changes)


class Net(nn.Module):
    """Two layers with dropout; `spare` takes part only when asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.spare = nn.Linear(40, 160), nn.Linear(160, 8), nn.Linear(8, 8)
        self.to(dtype)

    def forward(self, x_NI: Tensor, *, spare: bool = False) -> Tensor:
        hidden_NH = nn.functional.dropout(self.up(x_NI).relu(), 0.1, self.training)
        out_NO = self.down(hidden_NH)
        return (self.spare(out_NO) if spare else out_NO).float().square().mean()


def run_step(net: Net, updates: Updates, step: int) -> float:
    """Two micro-batches whose data depend on the step; `spare` takes part in the first alone. The gradient's norm."""
    dtype = net.up.weight.dtype
    x_MNI = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(step)).to(dtype)
    updates.set_rate(1e-3 / (step + 1))
    net(x_MNI[0], spare=True).backward()
    updates.begin_last_micro_batch()
    net(x_MNI[1]).backward()
    norm = float(updates.gradient_norm())
    updates.finish()
    return norm


def weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def test_an_update_far_below_bfloat16_is_lost_by_rounding_to_nearest_alone() -> None:
    # With gradient 1 AdamW moves by the rate, 2^-14. Below 1 bfloat16 steps by 2^-8, so nearest needs 2^-9 to move.
    # In 64 steps a weight has to go 64 * 2^-14 = 2^-8, one such step down.
    def moved(build: Callable[[nn.Parameter], torch.optim.Optimizer]) -> Tensor:
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = build(weight)
        for _ in range(64):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach().float()

    rate = 2.0**-14
    assert torch.equal(moved(lambda w: torch.optim.AdamW([w], lr=rate, weight_decay=0)), torch.ones(4096))
    kahan = moved(lambda w: RoundingAdamW([w], "kahan", lr=rate))
    assert torch.equal(kahan, torch.full((4096,), 1 - 2.0**-8))
    torch.manual_seed(0)
    stochastic = moved(lambda w: RoundingAdamW([w], "stochastic", lr=rate))
    # Each step moves a weight by 2^-8 with probability 2^-6: variance 64 * 2^-6 * 2^-16, over the mean of 4096 weights
    # a deviation of 2^-14. Five of them.
    assert abs(float(stochastic.mean()) - (1 - 2.0**-8)) < 5 * 2.0**-14
    assert len(stochastic.unique()) > 2  # by chance, and not all alike


@pytest.mark.parametrize("bucket", [64, 2**20])
def test_kahan_is_float32_weights_to_the_bit(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowprecision, "BUCKET", bucket)  # 64: every matrix is cut into several pieces
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 24), (5, 3, 16), (33,), ()]
    held = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
    held.append(nn.Parameter(torch.randn(24, 16).bfloat16().T))  # rows that don't lie together in memory
    wide = [nn.Parameter(p.detach().float().contiguous()) for p in held]
    mine = RoundingAdamW(held, "kahan", lr=1e-3, weight_decay=0.1)
    torchs = torch.optim.AdamW(wide, lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(10):
        for narrow, master in zip(held, wide, strict=True):
            if step != 3 or narrow.ndim != 1:  # one parameter sits a step out
                narrow.grad = torch.randn(narrow.shape).bfloat16()
                master.grad = narrow.grad.float()
        mine.step()
        torchs.step()
        mine.zero_grad()
        torchs.zero_grad()
    for narrow, master in zip(held, wide, strict=True):
        assert torch.equal(join(narrow.detach(), mine.state[narrow]["lost"]), master)
        assert torch.equal(narrow, split(master.detach())[0])


def test_split_halves_join_to_the_same_float32() -> None:
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 + 2.0**-8, -1 - 2.0**-8, 1e-45, -1e-40, 2.0**-126, math.inf])
    values = torch.cat([edges, bits.view(torch.float32)])
    values = values[~values.isnan() & ((values.abs() < 3e38) | values.isinf())]
    high, lost = split(values)
    assert (high.dtype, lost.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, lost).view(torch.int32), values.view(torch.int32))  # the sign of zero included
    normal = values[values.isfinite() & (values.abs() >= 2.0**-126)]
    assert bool(((split(normal)[0].float() - normal).abs() <= normal.abs() * 2.0**-8).all())  # half a place at most


@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_rounding_is_right_in_expectation_at_every_place(sign: int) -> None:
    # 1 + 2^-9 lies a quarter of the way from 1 to 1 + 2^-7. A fair quarter of n deviates by sqrt(3 / 16 / n).
    torch.manual_seed(0)
    count = 40_000
    rounded = round_stochastically(torch.full((count, 4), sign * (1 + 2.0**-9))).float()
    assert set(rounded.unique().tolist()) == {sign * 1.0, sign * (1 + 2.0**-7)}
    up = (rounded.abs() > 1).float().mean(0)  # each fourth value apart: four share a random word
    assert bool((abs(up - 0.25) < 5 * math.sqrt(3 / 16 / count)).all())


def test_stochastic_rounding_leaves_what_bfloat16_holds() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    for _ in range(20):
        assert torch.equal(round_stochastically(every.float()), every)


def test_bfloat16_weights_learn_as_float32_masters_do() -> None:
    # Weights of 0.3 step by 2^-9 or 2^-10: a rate of 1e-4 is below half of that, so nearest loses most of the way.
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.3)

    def learn(rounding: Rounding | None, *, masters: bool = False) -> tuple[float, float]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16().to(torch.float32 if masters else torch.bfloat16)
        plain = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
        optimizer = plain if rounding is None else RoundingAdamW(model.parameters(), rounding, lr=1e-4)
        losses = []
        for _ in range(60):
            with torch.autocast("cpu", torch.bfloat16, enabled=masters):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses[0], losses[-1]

    first, aim = learn(None, masters=True)
    fall = first - aim
    for rounding in ("stochastic", "kahan"):
        # bfloat16 sums of the gradient differ from float32's by 2^-9 of their terms; a twentieth leaves room for that
        assert learn(rounding)[1] == pytest.approx(aim, abs=0.05 * fall)
    assert learn(None)[1] - aim > 0.5 * fall


def test_a_new_head_stays_float32_on_bfloat16_weights(tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneSpec(name=str(tiny_bert), dtype="bfloat16"), LABELS)
    adapted = Full(weights="kahan").attach(backbone)
    assert adapted.rounding == "kahan"
    assert adapted.autocast is None
    assert sum(p.numel() for p in adapted.trainable().values()) == Full().trainable_params(backbone.dims)
    wide = {name for name, parameter in adapted.model.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {"classifier.weight", "classifier.bias"}
    updates = open_updates(adapted.trainable(), settings(), adapted.rounding)
    before = {name: parameter.detach().clone() for name, parameter in adapted.trainable().items()}
    adapted.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([1])).loss.backward()
    updates.gradient_norm()
    updates.finish()
    for name, parameter in adapted.trainable().items():
        assert parameter.dtype == before[name].dtype
    # One float32 step of AdamW: every weight of the head moves by about the rate, 1e-3, of which bfloat16 holds little.
    head = adapted.model.get_parameter("classifier.weight").detach()
    expected = before["classifier.weight"] * (1 - 1e-3 * 0.1)
    torch.testing.assert_close((head - expected).abs(), torch.full_like(head, 1e-3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bfloat16_weights_are_refused_where_the_backbone_computes_in_another_dtype(dtype: str, tiny_bert: Path) -> None:
    backbone = load_backbone(BackboneSpec.model_validate({"name": str(tiny_bert), "dtype": dtype}), LABELS)
    with pytest.raises(MethodError, match=rf"computes in {dtype}\. Set backbone\.dtype=bfloat16"):
        Full(weights="stochastic").attach(backbone)


def test_the_label_names_how_the_weights_are_held() -> None:
    assert [Full().label("none"), Full(weights="kahan").label("none")] == ["full", "full-kahan"]


RESUMED = [
    ("float32", None, {}),
    ("float32", None, {"optimizer": "adamw-8bit"}),
    ("bfloat16", "stochastic", {}),
    ("bfloat16", "kahan", {}),
    ("float32", None, {"optimizer_in_backward": True}),
    ("bfloat16", "stochastic", {"optimizer_in_backward": True}),
    ("bfloat16", "kahan", {"optimizer_in_backward": True}),
]


@pytest.mark.parametrize(("dtype", "rounding", "changes"), RESUMED)
def test_a_resumed_optimizer_goes_on_in_the_same_bits(
    dtype: str, rounding: Rounding | None, changes: dict[str, Any], tmp_path: Path
) -> None:
    def fresh() -> tuple[Net, Any]:
        net = Net(getattr(torch, dtype))
        return net, open_updates(dict(net.named_parameters()), settings(**changes), rounding)

    net, updates = fresh()
    for step in range(6):
        if step == 3:
            save_checkpoint(tmp_path, step, dict(net.named_parameters()), updates, None)
        run_step(net, updates, step)
    again, others = fresh()
    run_step(again, others, 0)  # a state that the checkpoint replaces
    load_checkpoint(tmp_path / "step-000003", dict(again.named_parameters()), others)
    for step in range(3, 6):
        run_step(again, others, step)
    assert all(torch.equal(one, other) for one, other in zip(weights(net), weights(again), strict=True))


@pytest.mark.parametrize(
    ("dtype", "rounding", "optimizer"),
    [
        ("float32", None, "adamw"),
        ("float32", None, "adamw-8bit"),
        ("bfloat16", "kahan", "adamw"),
    ],
)
def test_steps_within_the_backward_pass_end_in_the_same_bits(
    dtype: str, rounding: Rounding | None, optimizer: str
) -> None:
    ends, norms = [], []
    for within in (False, True):
        net = Net(getattr(torch, dtype))
        training = settings(optimizer=optimizer, optimizer_in_backward=within)
        updates = open_updates(dict(net.named_parameters()), training, rounding)
        norms.append([run_step(net, updates, step) for step in range(3)])
        ends.append(weights(net))
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert not torch.equal(ends[0][0], Net(getattr(torch, dtype)).up.weight)
    # Summed per tensor either way; the norm of bfloat16 gradients is itself rounded to bfloat16, by 2^-9 at most.
    assert norms[0] == pytest.approx(norms[1], rel=1e-6 if dtype == "float32" else 2.0**-7)


def test_within_the_backward_pass_no_two_gradients_live_at_once() -> None:
    net = Net()
    updates = open_updates(dict(net.named_parameters()), settings(optimizer_in_backward=True))
    alive: list[int] = []
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: alive.append(sum(p.grad is not None for p in net.parameters())))
    updates.begin_last_micro_batch()
    before = weights(net)
    net(torch.ones(2, 40), spare=True).backward()
    assert alive == [0] * 6  # when a gradient arrives, those before it are gone
    assert all(not torch.equal(one, other) for one, other in zip(before, weights(net), strict=True))
    assert updates.received() == set(dict(net.named_parameters()))
    updates.finish()
    assert updates.received() == set()


def test_before_the_last_micro_batch_gradients_add_up_and_nothing_moves() -> None:
    net = Net().eval()
    updates = open_updates(dict(net.named_parameters()), settings(optimizer_in_backward=True))
    before = weights(net)
    for _ in range(2):
        net(torch.ones(2, 40)).backward()
    assert updates.received() == set()
    assert all(torch.equal(one, other) for one, other in zip(before, weights(net), strict=True))
    assert net.up.weight.grad is not None
    twice = net.up.weight.grad.clone()
    net.zero_grad()
    net(torch.ones(2, 40)).backward()
    assert torch.equal(twice, 2 * net.up.weight.grad)  # doubling is exact


def test_eight_bit_moments_train_on_the_processor_in_two_bytes_a_weight() -> None:
    losses: dict[str, list[float]] = {}
    for optimizer in ("adamw", "adamw-8bit"):
        net = Net().eval()
        built = build_optimizer([net.up.weight, net.down.weight], settings(optimizer=optimizer, learning_rate=3e-3))
        x_NI, losses[optimizer] = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)), []
        for _ in range(20):
            loss = net(x_NI)
            loss.backward()
            built.step()
            built.zero_grad()
            losses[optimizer].append(float(loss.detach()))
        state = built.state[net.up.weight]
    # 6,400 weights: two bytes of moments each, and a float32 scale for each 256 of them.
    assert (state["state1"].dtype, state["state2"].dtype) == (torch.uint8, torch.uint8)
    assert [state["state1"].nbytes, state["absmax1"].nbytes] == [6400, 25 * 4]
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]
    # Moments are rounded to about 1 % each step; the fall of the loss is the same to a few of those.
    assert losses["adamw-8bit"][-1] == pytest.approx(losses["adamw"][-1], abs=0.05 * losses["adamw"][0])


def test_paging_optimizers_are_refused_without_cuda() -> None:
    with pytest.raises(InputError, match=r"runs on cuda devices only.*training\.optimizer=adamw or adamw-8bit"):
        build_optimizer(Net().parameters(), settings(optimizer="paged-adamw-8bit"))


def test_bfloat16_weights_take_no_optimizer_that_rounds_to_nearest() -> None:
    with pytest.raises(InputError, match=r"method\.weights=kahan.*training\.optimizer=adamw"):
        build_optimizer(Net(torch.bfloat16).parameters(), settings(optimizer="adamw-8bit"), "kahan")

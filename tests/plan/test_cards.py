"""Cards are found under the names people and drivers use, and the table holds together."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import psutil
import pytest
import torch

from peftkit.errors import InputError
from peftkit.plan.cards import CARDS, Card, find_card, parse_gpu, this_machine
from peftkit.units import GIB


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("RTX 3060", "RTX 3060"),
        ("rtx3060", "RTX 3060"),
        ("4090", "RTX 4090"),
        (" geforce rtx-4090 ", "RTX 4090"),
        ("RTX 4090 24GB", "RTX 4090"),
        ("a100-80gb", "A100 80GB"),
        ("A100 40", "A100 40GB"),
        ("4060ti 16GB", "RTX 4060 Ti 16GB"),
        ("4060ti16gib", "RTX 4060 Ti 16GB"),
        ("4070tisuper", "RTX 4070 Ti Super"),
        ("3060 laptop", "RTX 3060 Laptop"),
        ("a10g", "A10G"),
        ("a10", "A10"),
        ("l40s", "L40S"),
        ("h100-nvl", "H100 NVL"),
        ("h100 sxm5", "H100 SXM"),
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", "RTX 4070 Laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_spelling_is_loose(spelled: str, name: str) -> None:
    assert find_card(spelled).name == name
    assert parse_gpu(spelled).name == name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_each_card_answers_to_its_own_name(card: Card) -> None:
    assert find_card(card.name) is card


@pytest.mark.parametrize(
    ("spelled", "named"),
    [
        ("rtx 3080", ["'RTX 3080 10GB'", "'RTX 3080 12GB'", "say which"]),
        ("a100", ["'A100 40GB'", "'A100 80GB'", "say which"]),
        ("h100", ["'H100 PCIe' (80 GB)", "'H100 SXM' (80 GB)", "'H100 NVL' (94 GB)"]),
        ("h100 80gb", ["'H100 PCIe'", "'H100 SXM'"]),
        ("rtx 4090 48GB", ["does not come with 48 GB", "'RTX 4090' (24 GB)", "48GiB"]),
        ("rtx 4095", ["did you mean 'rtx 4090'?", "24GiB"]),
        ("24", ["no card is known as '24'", "with a unit"]),
        ("24G", ["no card is known as '24G'", "with a unit"]),
        ("", ["no card is known as ''"]),
        ("0 GiB", ["holds nothing"]),
        ("NVIDIA GeForce RTX 4090 D", ["no card is known"]),
    ],
)
def test_what_names_no_single_card_is_refused_with_a_remedy(spelled: str, named: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        parse_gpu(spelled)
    assert [part for part in named if part not in str(refusal.value)] == []


def test_an_ambiguous_name_lists_nothing_that_was_ruled_out() -> None:
    with pytest.raises(InputError) as refusal:
        find_card("h100 80gb")
    assert "NVL" not in str(refusal.value)


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("12GiB", 12 * GIB),
        ("24GB", 24 * 10**9),
        ("24576MiB", 24 * GIB),
        ("15.5 gib", 15 * GIB + GIB // 2),
        ("80000 MB", 80 * 10**9),
        ("1TiB", 1024 * GIB),
    ],
)
def test_a_size_is_a_card_of_unknown_speed(size: str, num_bytes: int) -> None:
    assert parse_gpu(size) == Card(size, num_bytes)
    assert (parse_gpu(size).half_tflops, parse_gpu(size).bandwidth_bytes_per_second) == (None, None)


def test_figures_lie_where_cards_of_these_years_lie() -> None:
    # from the slowest laptop's GDDR6 to HBM3e, and from Pascal to Blackwell
    for card in CARDS:
        assert card.bandwidth_bytes_per_second is not None
        assert card.half_tflops is not None
        assert card.fp32_tflops is not None
        assert card.advertised_gb is not None
        assert 1e11 < card.bandwidth_bytes_per_second < 1e13, card.name
        assert 5 < card.fp32_tflops <= card.half_tflops < 3000, card.name
        assert card.fp32_tflops < 130, card.name
        assert 0.9 < card.memory_bytes / (card.advertised_gb * GIB) <= 1, card.name
    assert len({card.name for card in CARDS}) == len(CARDS)


def test_more_advertised_memory_is_more_memory() -> None:
    for one, other in product(CARDS, CARDS):
        assert one.advertised_gb is not None
        assert other.advertised_gb is not None
        if one.advertised_gb < other.advertised_gb:
            assert one.memory_bytes < other.memory_bytes, (one.name, other.name)


@pytest.mark.parametrize(
    ("start", "ratio"),
    [
        # floating point operations per clock and multiprocessor, in tensor cores with fp32 accumulation and outside:
        # 512 and 128 on Turing; 512 and 256 on later GeForce cards; 1024 and 256 where the tensor cores run in full
        ("RTX 20", 4),
        ("RTX 30", 2),
        ("RTX 40", 2),
        ("RTX 50", 2),
        ("RTX A", 4),
        ("RTX 6000 Ada", 4),
        ("L40S", 4),
        ("A40", 4),
    ],
)
def test_tensor_cores_are_as_many_times_faster_as_their_architecture_says(start: str, ratio: int) -> None:
    found = [card for card in CARDS if card.name.startswith(start)]
    assert found
    for card in found:
        assert card.half_tflops is not None
        assert card.fp32_tflops is not None
        # data sheets round to three digits
        assert card.half_tflops / card.fp32_tflops == pytest.approx(ratio, rel=0.02), card.name


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, name: str, memory_bytes: int) -> None:
    properties = SimpleNamespace(name=name, total_memory=memory_bytes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


def test_a_machine_without_cuda_is_its_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine() == Card("this machine", psutil.virtual_memory().total, kind="cpu")


def test_a_known_device_keeps_its_own_memory_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # a driver that reports the full 10 GiB, and a name that two sizes share
    pretend_cuda(monkeypatch, "NVIDIA GeForce RTX 3080", 10 * GIB)
    card = this_machine()
    assert (card.name, card.memory_bytes, card.kind) == ("NVIDIA GeForce RTX 3080", 10 * GIB, "cuda")
    assert card.bandwidth_bytes_per_second == find_card("RTX 3080 10GB").bandwidth_bytes_per_second


@pytest.mark.parametrize(
    ("name", "memory_bytes"),
    [("NVIDIA GeForce RTX 3060", 8 * GIB), ("NVIDIA H100", 79 * GIB), ("NVIDIA Something New", 99 * GIB)],
)
def test_an_unknown_device_has_memory_and_no_rates(
    monkeypatch: pytest.MonkeyPatch, name: str, memory_bytes: int
) -> None:
    # an RTX 3060 with 8 GB has another memory bus than the one in the table, and an H100 has three speeds
    pretend_cuda(monkeypatch, name, memory_bytes)
    assert this_machine() == Card(name, memory_bytes, bfloat16=True)

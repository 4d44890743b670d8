"""The scripts that compare with peers: both sides see the same, and what they print is what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import paired
import publish
import sides
import vs_trainer
from attribution import Sizes, group_of
from flops import model_flops

from peftkit.backbones.load import dims_of
from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.methods.full import Full
from peftkit.methods.lora import Lora


def sample(**changes: Any) -> sides.Sample:
    """A run of four steps, the first two of which are slow."""
    values = {
        "step_seconds": [9.0, 9.0, 1.0, 2.0],
        "cpu_seconds": [9.0, 9.0, 2.0, 4.0],
        "tokens": [10, 10, 10, 20],
        "samples": [1, 1, 1, 2],
        "losses": [2.0, 1.0, 1.0, 1.0],
        "gradient_norms": [1.0, 1.0, 1.0, 1.0],
        "validation_loss": 1.0,
        "baseline_bytes": 100,
        "peak_bytes": 400,
    }
    return sides.Sample(**(values | changes))


def test_rates_leave_out_the_first_two_steps() -> None:
    run = sample()
    assert paired.RATIOS["tokens_per_second"].of(run) == pytest.approx((10 + 20) / (1 + 2))
    assert paired.RATIOS["tokens_per_cpu_second"].of(run) == pytest.approx((10 + 20) / (2 + 4))
    assert paired.RATIOS["training_bytes"].of(run) == 400 - 100


def test_where_a_cache_is_filled_the_first_steps_count() -> None:
    def judged_by(epochs: int) -> list[float]:
        comparison = sides.Comparison({"training": {"epochs": epochs}}, "lora-top", "tuned", 4)
        return [paired.RATIOS[name].of(sample()) for name in paired.headline(comparison)]

    assert judged_by(1) == pytest.approx([(10 + 20) / (1 + 2), (10 + 20) / (2 + 4)])
    assert judged_by(3) == pytest.approx([50 / 21, 50 / 24])


def test_a_ratio_is_taken_within_each_pair() -> None:
    pairs = [
        {
            "peftkit": sample(step_seconds=[9, 9, 1, 2 * factor - 1]),
            "peer": sample(step_seconds=[9, 9, 1, 6 * factor - 1]),
        }
        for factor in (1, 2, 3)
    ]
    found = paired.ratio(paired.RATIOS["tokens_per_second"], pairs)
    assert (found["min"], found["median"], found["max"]) == pytest.approx((3, 3, 3))
    assert found["peftkit"] == pytest.approx(30 / 4), (
        "the median over pairs, of which the slowest takes three times as long"
    )


def test_grouping_orders_within_a_step_and_never_across() -> None:
    steps = [[{"input_ids": [0] * length} for length in lengths] for lengths in ((2, 5, 3), (9, 1, 4))]
    ground = sides.Ground("", None, "", steps, [], [])

    def lengths(peer: str) -> list[int]:
        return [len(example["input_ids"]) for example in ground.cut(sides.Comparison({}, "lora", peer, 1))]

    assert lengths("tuned") == [2, 5, 3, 9, 1, 4]
    assert lengths("grouped") == [5, 3, 2, 9, 4, 1]


@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 4}, {"kind": "full"}])
@pytest.mark.filterwarnings("ignore")
def test_trainer_and_peftkit_train_alike(method: Any, classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe(
        *("training.batch_size=4", "training.epochs=2", "training.dropout=0", "training.log_every=1"),
        *("data.test=null", "evaluation.every=never", "training.learning_rate=1e-3"),
        method=method,
    )
    comparison = sides.Comparison(recipe.to_dict(), "lora", "grouped", 2)
    (tmp_path / "comparison.json").write_text(json.dumps(sides.asdict(comparison)))
    sides.lay_ground(tmp_path)
    ours = sides.train_with_peftkit(tmp_path)
    theirs = vs_trainer.train_with_transformers(comparison, sides.read_ground(tmp_path), tmp_path)
    # float32 sums of other orders: 1e-6 relative a step, and AdamW's first steps are as long whatever their gradient
    assert theirs.losses == pytest.approx(ours.losses, rel=1e-4)
    assert theirs.gradient_norms == pytest.approx(ours.gradient_norms, rel=1e-3)
    assert theirs.validation_loss == pytest.approx(ours.validation_loss, rel=1e-4)
    assert theirs.losses[-1] != pytest.approx(theirs.losses[0], rel=1e-3), "nothing was trained"


def event(name: str, *shapes: list[int], parent: Any = None) -> Any:
    """An operator as the profiler gives it."""
    return SimpleNamespace(name=name, input_shapes=list(shapes), cpu_parent=parent)


@pytest.mark.parametrize(
    ("operator", "group"),
    [
        (event("aten::mm", [700, 32], [32, 64]), "base matmuls"),
        (event("aten::mm", [64, 700], [700, 32]), "base matmuls"),
        (event("aten::addmm_", [700, 64], [700, 8], [8, 64]), "adapters"),
        (event("aten::mm", [90, 32], [32, 5000]), "head and loss"),
        (event("aten::sub_", [90, 5000]), "head and loss"),
        (event("aten::bmm", [8, 10, 4], [8, 4, 10]), "attention"),
        (event("aten::mul", [4], parent=event("Optimizer.step#AdamW.step")), "optimizer"),
        (event("aten::copy_", [4], parent=event("_RmsNormBackward")), "layers"),
        (event("aten::mul", [7, 32]), "layers"),
        (event("aten::embedding", [5000, 32]), "other"),
        (event("ProfilerStep#3"), "python, autograd"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_an_operator_belongs_to_its_part_of_the_step(operator: Any, group: str) -> None:
    assert group_of(operator, Sizes(frozenset({frozenset({32, 64})}), 8, 5000)) == group


def test_model_flops_of_lora_and_full_finetuning(chat_recipe: Any) -> None:
    dims = dims_of(chat_recipe().backbone, LANGUAGE_HEAD)
    example = {"input_ids": [1] * 10, "labels": [-100] * 7 + [1] * 3}
    attention = 3 * 2 * (4 * dims.heads * dims.head_dim * 10**2 // 2)  # two blocks; a pair is seen from one side
    linears = sum(2 * linear.in_features * linear.out_features * 10 for linear in dims.linears)
    adapters = sum(2 * 4 * (linear.in_features + linear.out_features) * 10 for linear in dims.linears)
    head = 2 * dims.hidden * dims.vocab * 3
    assert model_flops(Lora(rank=4), dims, [example]) == 2 * linears + 3 * adapters + attention + 2 * head
    assert model_flops(Full(), dims, [example]) == 3 * linears + attention + 3 * head


def test_a_frozen_block_below_the_trained_ones_costs_a_forward(chat_recipe: Any) -> None:
    dims = dims_of(chat_recipe().backbone, LANGUAGE_HEAD)
    example = {"input_ids": [1] * 10, "labels": [1] * 10}
    block = [linear for linear in dims.linears if linear.layer == 0]
    backward = sum(2 * linear.in_features * linear.out_features * 10 for linear in block)
    adapters = sum(3 * 2 * 4 * (linear.in_features + linear.out_features) * 10 for linear in block)
    attention = 2 * (4 * dims.heads * dims.head_dim * 10**2 // 2)
    whole, upper = (model_flops(Lora(rank=4, layers=layers), dims, [example]) for layers in ("all", "top-1"))
    assert whole - upper == backward + adapters + attention


def test_measured_rows_of_one_kind_share_a_published_table(tmp_path: Path) -> None:
    environment = {"packages": {"torch": "2"}, "threads": 1}
    for name in ("full", "lora"):
        rows = [{"job": name, "ratio": "2.00 [1.90, 2.10]"}]
        document = {"note": "Medians.", "command": f"run {name}", "rows": rows, "environment": environment}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    text = publish.measured_section(tmp_path)
    assert "| full | 2.00 \\[1.90, 2.10\\] |\n| lora | 2.00 \\[1.90, 2.10\\] |" in text
    assert "run full\nrun lora" in text
    assert text.count("| threads | 1 |") == 1

"""Which step of a run needs most, and what of it is enough to simulate."""

from __future__ import annotations

from typing import Any

from peftkit.backbones.load import dims_of
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec
from peftkit.data.batching import step_order
from peftkit.plan.workload import heaviest_forwards, workload_at_most, workload_of
from peftkit.recipe import Recipe, build_recipe


def recipe_with(**training: Any) -> Recipe:
    return build_recipe(
        {
            "backbone": {"name": "smollm2-135m"},
            "method": {"kind": "lora"},
            "data": {"train": "builtin:chatterbot-en"},
            "training": {"batch_size": 2, "epochs": 1, "micro_batch": "64 tokens", **training},
        }
    )


def test_the_heaviest_step_is_the_one_with_the_largest_forward() -> None:
    lengths = [10, 20, 60, 30, 50, 40]
    steps = step_order(len(lengths), 2, seed=0, epoch=0)
    # 64 tokens a forward: a step is one forward where its two examples have room together, else the longer one alone
    largest = [max(s) if sum(s := [lengths[i] for i in step]) > 64 else sum(s) for step in steps]
    found = workload_of(recipe_with(), lengths)
    at = max(range(len(steps)), key=lambda index: (largest[index], max(lengths[i] for i in steps[index])))
    assert found.longest == tuple(lengths[i] for i in steps[at])
    assert found.heaviest_step == at
    assert found.first == tuple(lengths[i] for i in steps[0])
    assert found.step_tokens == sum(lengths) / 3


def test_later_epochs_are_looked_at_too() -> None:
    lengths = [5, 60, 7, 50]
    together = next(
        epoch
        for epoch in range(40)
        if any({1, 3} == set(step.tolist()) for step in step_order(4, 2, seed=0, epoch=epoch))
    )
    recipe = recipe_with(epochs=together + 1, micro_batch="128 tokens")
    assert sorted(workload_of(recipe, lengths).longest) == [50, 60]
    assert workload_of(recipe, lengths).heaviest_step in (2 * together, 2 * together + 1)


def test_steps_stop_where_the_recipe_does() -> None:
    lengths = [1, 2, 3, 4, 5, 6]
    steps = step_order(6, 2, seed=0, epoch=0)
    assert workload_of(recipe_with(max_steps=1), lengths).longest == tuple(lengths[i] for i in steps[0])


def test_the_two_largest_forwards_stand_for_a_step() -> None:
    # longest first, within 64 tokens and of like size: [60], [50], [40], [30, 20, 10]
    assert sorted(heaviest_forwards(recipe_with(), [10, 20, 60, 30, 50, 40], device="cuda")) == [10, 20, 30, 60]


def test_without_data_every_example_is_as_long_as_recipe_and_positions_allow() -> None:
    dims = dims_of(BackboneSpec(name="smollm2-135m"), LANGUAGE_HEAD)
    found = workload_at_most(recipe_with(max_tokens=512), dims)
    assert (found.longest, found.source, found.num_steps(recipe_with())) == ((512, 512), "recipe", None)
    assert workload_at_most(recipe_with(max_tokens=10**6), dims).longest == (8192, 8192)  # its positions


def test_steps_are_counted_from_epochs_or_said_by_the_recipe() -> None:
    lengths = [3] * 5
    # five examples, two a step: three steps an epoch
    assert workload_of(recipe_with(epochs=2), lengths).num_steps(recipe_with(epochs=2)) == 6
    assert workload_of(recipe_with(), lengths).num_steps(recipe_with(max_steps=4)) == 4

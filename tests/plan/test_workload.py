"""Which step of a run needs most, and what of it is enough to simulate."""

from __future__ import annotations

from typing import Any

from peftkit.backbones.load import dims_of
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec
from peftkit.data.batching import step_order
from peftkit.plan.sizes import Size, fully_labelled
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
    sizes = [Size(length, length // 2) for length in lengths]
    found = workload_of(recipe_with(), sizes)
    at = max(range(len(steps)), key=lambda index: (largest[index], max(lengths[i] for i in steps[index])))
    assert found.longest == tuple(sizes[i] for i in steps[at])
    assert found.heaviest_step == at
    assert found.first == tuple(sizes[i] for i in steps[0])
    assert found.step_tokens == sum(lengths) / 3


def test_later_epochs_are_looked_at_too() -> None:
    sizes = fully_labelled([5, 60, 7, 50])
    together = next(
        epoch
        for epoch in range(40)
        if any({1, 3} == set(step.tolist()) for step in step_order(4, 2, seed=0, epoch=epoch))
    )
    recipe = recipe_with(epochs=together + 1, micro_batch="128 tokens")
    assert sorted(workload_of(recipe, sizes).longest) == [sizes[3], sizes[1]]
    assert workload_of(recipe, sizes).heaviest_step in (2 * together, 2 * together + 1)


def test_steps_stop_where_the_recipe_does() -> None:
    sizes = fully_labelled([1, 2, 3, 4, 5, 6])
    steps = step_order(6, 2, seed=0, epoch=0)
    assert workload_of(recipe_with(max_steps=1), sizes).longest == tuple(sizes[i] for i in steps[0])


def test_the_two_largest_forwards_stand_for_a_step() -> None:
    # longest first, within 64 tokens and of like size: [60], [50], [40], [30, 20, 10]
    sizes = fully_labelled([10, 20, 60, 30, 50, 40])
    assert [size.tokens for size in sorted(heaviest_forwards(recipe_with(), sizes, device="cuda"))] == [10, 20, 30, 60]


def test_without_data_every_example_is_as_long_as_recipe_and_positions_allow() -> None:
    dims = dims_of(BackboneSpec(name="smollm2-135m"), LANGUAGE_HEAD)
    found = workload_at_most(recipe_with(max_tokens=512), dims)
    assert (found.source, found.num_steps(recipe_with())) == ("recipe", None)
    assert found.longest == fully_labelled((512, 512))
    assert workload_at_most(recipe_with(max_tokens=10**6), dims).longest[0].tokens == 8192  # its positions


def test_steps_are_counted_from_epochs_or_said_by_the_recipe() -> None:
    sizes = fully_labelled([3] * 5)
    # five examples, two a step: three steps an epoch
    assert workload_of(recipe_with(epochs=2), sizes).num_steps(recipe_with(epochs=2)) == 6
    assert workload_of(recipe_with(), sizes).num_steps(recipe_with(max_steps=4)) == 4

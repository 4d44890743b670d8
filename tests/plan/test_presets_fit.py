"""Every preset that is named for a size of card has room on the smallest card of that size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peftkit.backbones.spec import LANGUAGE_HEAD
from peftkit.plan.cards import CARDS, Card
from peftkit.plan.planner import Planner
from peftkit.recipe import load_recipe

PRESETS = sorted((Path(__file__).parent.parent.parent / "recipes").glob("card-*.yaml"))


def smallest(gb: int) -> Card:
    return min(
        (card for card in CARDS if card.advertised_gb == gb and card.bfloat16), key=lambda card: card.memory_bytes
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_fits_the_card_it_is_named_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = re.match(r"card-(\d+)gb-", path.stem)
    assert found is not None
    card = smallest(int(found[1]))
    recipe = load_recipe(path)
    plan = Planner.open(recipe, LANGUAGE_HEAD, card).plan(recipe)
    assert plan.fits, plan.trouble
    half = Card("half", card.memory_bytes // 4, bfloat16=True)
    assert not Planner.open(recipe, LANGUAGE_HEAD, half).plan(recipe).fits, "a quarter of the card would do as well"

"""A run on a processor keeps few compiled products, unless somebody says how many."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peftkit.onednn import CAPACITIES, KEPT, bound_caches

GROWTH = """
import peftkit, psutil
peftkit.train
import torch
weight = torch.randn(384, 384, dtype=torch.bfloat16)
def held(): return psutil.Process().memory_info().rss
for tokens in range(300, 340): torch.randn(tokens, 384, dtype=torch.bfloat16) @ weight.T
before = held()
for tokens in range(340, 640): torch.randn(tokens, 384, dtype=torch.bfloat16) @ weight.T
print(held() - before)
"""


def test_what_somebody_set_is_left_alone() -> None:
    environment = {CAPACITIES[0]: "7"}
    bound_caches(environment)
    assert environment == {CAPACITIES[0]: "7", CAPACITIES[1]: str(KEPT)}


def test_products_of_ever_new_shapes_do_not_pile_up() -> None:
    def growth(**changes: str) -> int:
        clean = {name: value for name, value in os.environ.items() if name not in CAPACITIES}
        told = subprocess.run([sys.executable, "-c", GROWTH], env=clean | changes, stdout=subprocess.PIPE, check=True)
        return int(told.stdout)

    unbounded = growth(**dict.fromkeys(CAPACITIES, "1024"))
    if unbounded < 2**24:
        pytest.skip("this processor's bfloat16 products are not compiled for each shape, so there is nothing to bound")
    assert growth() < unbounded / 2

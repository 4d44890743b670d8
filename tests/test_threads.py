"""How threads wait is decided once, by what the machine is doing and what somebody has said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peftkit.threads import IDLE, SPINS, WAITING, idle_share, settle

SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


def test_on_a_quiet_machine_threads_look_for_work_before_they_sleep() -> None:
    environment: dict[str, str] = {}
    settle(environment, idle=lambda: IDLE)
    assert environment == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(SPINS)}


def test_on_a_busy_machine_they_sleep_at_once() -> None:
    environment: dict[str, str] = {}
    settle(environment, idle=lambda: IDLE - 0.01)
    assert environment == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize("name", WAITING)
def test_what_somebody_set_is_left_alone(name: str) -> None:
    environment = {name: "1"}
    settle(environment, idle=lambda: 1.0)
    assert environment == {name: "1"}


@pytest.mark.parametrize(("before", "settled"), [("", "passive"), ("sys.modules['torch'] = None", "None")])
def test_a_process_settles_before_torch_is_loaded_and_not_after(before: str, settled: str) -> None:
    code = f"import sys; {before}\nfrom peftkit import threads; threads.settle(idle=lambda: 0.0); {SHOW}"
    clean = {name: value for name, value in os.environ.items() if name not in WAITING}
    told = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert told.stdout.split() == [settled, "None"]


def test_the_idle_share_is_a_share() -> None:
    assert 0.0 <= idle_share() <= 1.0

"""Whether vLLM, SGLang and TGI take an adapter, and whether the remedy that is named makes them take it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config

from peftkit.backbones import local_path
from peftkit.backbones.spec import Head
from peftkit.cli import main
from peftkit.deploy.serving_check import SERVERS, check_serving
from peftkit.folder import BASE_NAME

Make = Callable[..., Path]
SENTIMENT = Head("classification", ("bad", "good"), "single_label_classification")


@pytest.mark.parametrize("engine", SERVERS)
def test_a_plain_lora_is_served_by_all_of_them(engine: str, make_lora: Make, tmp_path: Path) -> None:
    found = check_serving(make_lora(tmp_path / "a", rank=4), engine)
    assert found.accepted
    assert found.changes == ()
    assert found.rank == 4
    assert str(tmp_path / "a") in str(found.command)
    if engine == "vllm":
        assert "--max-lora-rank 8 " in str(found.command)  # the next of its choices


def test_a_packaged_base_is_named_by_its_folder(make_lora: Make, tmp_path: Path) -> None:
    path = make_lora(tmp_path / "a", rank=4)
    base = json.loads((path / BASE_NAME).read_text())
    (path / BASE_NAME).write_text(json.dumps(base | {"name": "smollm2-135m"}))
    assert f"vllm serve {local_path('smollm2-135m')} " in str(check_serving(path, "vllm").command)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("engine", "settings", "told"),
    [
        ("vllm", {"use_dora": True}, "vLLM knows no DoRA"),
        ("vllm", {"rank": 520, "target_modules": ["q_proj"]}, "rank 520 is above the 512"),
        ("tgi", {"rank": 130, "target_modules": ["q_proj"]}, "rank 130 is above the 128"),
        ("vllm", {"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head) was trained whole"),
        ("vllm", {"bias": "lora_only"}, "bias=lora_only"),
        ("vllm", {"target_modules": ["q_proj", "lm_head"]}, "lm_head, outside the blocks"),
        ("sglang", {"use_rslora": True}, "ignores use_rslora"),
        ("vllm", {"rank_pattern": {"q_proj": 2}, "lora_alpha": 8}, "scales all by one number"),
        ("vllm", {"init_lora_weights": "pissa"}, "changed the base"),
    ],
)
def test_what_stands_in_the_way_is_said(
    engine: str, settings: dict[str, Any], told: str, make_lora: Make, tmp_path: Path
) -> None:
    found = check_serving(make_lora(tmp_path / "a", **settings), engine)
    assert not found.accepted
    assert found.command is None
    assert any(told in change.problem for change in found.changes)


def test_rslora_and_one_rank_for_all_are_fine_where_they_are_heeded(make_lora: Make, tmp_path: Path) -> None:
    assert check_serving(make_lora(tmp_path / "a", use_rslora=True), "vllm").accepted


def test_other_methods_and_heads_are_merged(make_lora: Make, make_peft: Make, tiny_bert: Path, tmp_path: Path) -> None:
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])
    (change,) = check_serving(make_peft(tmp_path / "ia3", ia3), "vllm").changes
    assert "LoRA alone, and this is IA3" in change.problem
    head = {"base": tiny_bert, "head": SENTIMENT, "task_type": "SEQ_CLS", "target_modules": ["query"]}
    changes = check_serving(make_lora(tmp_path / "head", **head), "vllm").changes
    assert any("classification head" in each.problem for each in changes)
    assert all("peftkit merge" in each.remedy for each in changes)


def test_the_remedy_for_scales_of_its_own_works(make_lora: Make, tmp_path: Path, capsys: Any) -> None:
    folder = make_lora(tmp_path / "a", use_rslora=True)
    assert main(["export", str(folder), "--for", "sglang", "--json"]) == 1
    remedy = json.loads(capsys.readouterr().out)["changes"][0]["remedy"]
    words = remedy.partition("peftkit ")[2].partition(";")[0].split()
    words[words.index("PLAIN")] = str(tmp_path / "plain")
    assert main(words) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "plain"), "--for", "sglang"]) == 0
    assert "as it is" in capsys.readouterr().out

"""Inspecting, comparing and resizing adapters: spectra that are known, identities, and every wrong input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from peftkit.backbones.spec import Head
from peftkit.cli import main
from peftkit.deploy.care import diff, inspect
from peftkit.deploy.resize import ResizeReport, resize
from peftkit.errors import InputError, MethodError, OutputError
from peftkit.run import train

Make = Callable[..., Path]
Deltas = Callable[[Path], dict[str, torch.Tensor]]
SENTIMENT = Head("classification", ("bad", "good"), "single_label_classification")
QUERY = "model.layers.0.self_attn.q_proj"
CLOSE = 1e-5
"""Float32 products of order 1."""


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )


def set_spectrum(folder: Path, path: str, singular: list[float]) -> None:
    """Make B A of one module have these singular values, in random directions."""
    generator = torch.Generator().manual_seed(0)
    tensors = weights_of(folder)
    names = [f"base_model.model.{path}.lora_{side}.weight" for side in "AB"]
    (rank, width), height = tensors[names[0]].shape, tensors[names[1]].shape[0]
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (height, width))
    mixing = torch.randn(rank, rank, generator=generator)  # B and A need not be orthogonal for B A to have them
    up = left * torch.tensor(singular) @ mixing
    rewrite(folder, tensors | {names[0]: torch.linalg.solve(mixing, right.T), names[1]: up})


def test_norm_and_effective_rank_are_those_of_a_known_spectrum(make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "a", rank=4, lora_alpha=8, target_modules=["q_proj"], layers_to_transform=[0])
    set_spectrum(folder, QUERY, [4.0, 2.0, 1.0, 0.0])
    found = inspect(folder)
    (module,) = found.modules
    assert (module.path, module.shape, module.rank, module.scaling) == (QUERY, (32, 32), 4, 2.0)
    assert module.norm == pytest.approx(2 * math.sqrt(16 + 4 + 1), rel=1e-5)  # times alpha / rank
    assert module.largest_singular == pytest.approx(2 * 4, rel=1e-5)
    assert module.effective_rank == pytest.approx((16 + 4 + 1) ** 2 / (16**2 + 4**2 + 1), rel=1e-4)
    assert found.norm == pytest.approx(module.norm)
    assert found.layers[0].layer == 0
    assert found.layers[0].strongest == "q_proj"


def test_equal_singular_values_are_as_many_effective_ranks_and_an_untrained_adapter_has_none(
    make_lora: Make, tmp_path: Path
) -> None:
    folder = make_lora(tmp_path / "a", rank=3, target_modules=["q_proj"], layers_to_transform=[0])
    set_spectrum(folder, QUERY, [0.5, 0.5, 0.5])
    (module,) = inspect(folder).modules
    assert module.effective_rank == pytest.approx(3, rel=1e-4)
    assert module.numerical_rank == 3
    untrained = make_lora(tmp_path / "b", amount=0.0)
    assert {(each.norm, each.effective_rank, each.numerical_rank) for each in inspect(untrained).modules} == {(0, 0, 0)}


def test_layers_gather_their_modules(make_lora: Make, tmp_path: Path) -> None:
    found = inspect(make_lora(tmp_path / "a", rank_pattern={"down_proj": 2}))
    assert [(layer.layer, layer.modules) for layer in found.layers] == [(0, 3), (1, 3)]
    for layer in found.layers:
        inside = [module for module in found.modules if f".layers.{layer.layer}." in module.path]
        assert layer.norm == pytest.approx(math.sqrt(sum(module.norm**2 for module in inside)))
        assert layer.effective_rank == pytest.approx(sum(module.effective_rank for module in inside) / 3)
    assert found.ranks == (2, 4)
    assert found.targets == {"down_proj": 2, "q_proj": 2, "v_proj": 2}


def test_base_size_and_training_are_told(classify_recipe: Any, tmp_path: Path) -> None:
    recipe = classify_recipe("training.max_steps=2")
    record = train(recipe, tmp_path / "run")
    found = inspect(tmp_path / "run")
    known = json.loads((tmp_path / "run" / "adapter" / "base.json").read_text())
    assert found.base.model_dump() == known
    assert found.num_bytes == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert record.parameters is not None
    assert found.num_params == record.parameters.trainable
    assert found.training is not None
    assert found.training.recipe_digest == recipe.digest
    assert found.training.metrics == record.metrics
    assert found.method == "lora"
    assert found.head == "classification (bad, good)"
    assert {other.name.rsplit(".", 1)[-1] for other in found.others} == {"weight", "bias"}  # of the head
    assert inspect(tmp_path / "run" / "adapter").training == found.training


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM", target_modules=["q_proj"]), "use_dora=True"),
        (
            LoraConfig(r=2, init_lora_weights="pissa", task_type="CAUSAL_LM", target_modules=["q_proj"]),
            "frozen weights",
        ),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]), "IA3 is not made of"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING is not made of"),
    ],
    ids=["dora", "pissa", "ia3", "prompt"],
)
def test_a_method_that_is_more_than_b_and_a_says_so(config: Any, told: str, make_peft: Make, tmp_path: Path) -> None:
    found = inspect(make_peft(tmp_path / "a", config))
    assert told in found.delta
    assert found.num_params == sum(tensor.numel() for tensor in weights_of(tmp_path / "a").values())
    assert found.others or found.modules


def test_an_adapter_does_not_differ_from_itself(make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "a")
    found = diff(folder, folder)
    assert found.same_weights
    assert found.config == found.base == {}
    assert found.relative == pytest.approx(0, abs=1e-12)
    assert {round(module.cosine or 0, 12) for module in found.modules} == {1.0}


def test_a_difference_is_that_of_the_deltas_whatever_the_factors(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    a, b = make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2, rank=2, lora_alpha=5)
    found = diff(a, b)
    mine, theirs = deltas(a), deltas(b)
    for module in found.modules:
        one, other = mine[module.path].flatten(), theirs[module.path].flatten()
        assert module.relative == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-4)
        assert module.cosine == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)
    assert found.config["r"] == (4, 2)
    assert found.config["lora_alpha"] == (8, 5)
    turned = weights_of(a)
    for name in turned:  # minus B and minus A: the same delta
        turned[name] = -turned[name]
    folder = make_lora(tmp_path / "turned")
    rewrite(folder, turned)
    assert diff(a, folder).relative == pytest.approx(0, abs=1e-12)
    assert not diff(a, folder).same_weights


def test_half_an_adapter_is_half_as_far_and_points_the_same_way(make_lora: Make, tmp_path: Path) -> None:
    a, half = make_lora(tmp_path / "a", lora_alpha=8), make_lora(tmp_path / "half", lora_alpha=4)
    found = diff(a, half)
    assert found.relative == pytest.approx(0.5)
    assert found.cosine == pytest.approx(1.0)
    assert diff(half, a).relative == pytest.approx(1.0)


def test_what_only_one_of_two_has_is_named(make_lora: Make, tiny_bert: Path, tmp_path: Path) -> None:
    a, b = make_lora(tmp_path / "a"), make_lora(tmp_path / "b", target_modules=["q_proj", "o_proj"])
    found = diff(a, b)
    assert [module.path for module in found.modules] == [QUERY, QUERY.replace("0", "1")]
    assert found.only_in_a == tuple(
        f"model.layers.{layer}.{leaf}" for layer in (0, 1) for leaf in ("mlp.down_proj", "self_attn.v_proj")
    )
    assert found.only_in_b == ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj")
    bert = make_lora(tmp_path / "c", base=tiny_bert, head=SENTIMENT, task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(InputError, match="no module in common"):
        diff(a, bert)


def test_heads_are_compared_too(make_lora: Make, tiny_bert: Path, tmp_path: Path) -> None:
    settings = {"base": tiny_bert, "head": SENTIMENT, "task_type": "SEQ_CLS", "target_modules": ["query"]}
    a, b = make_lora(tmp_path / "a", **settings), make_lora(tmp_path / "b", **settings)
    tensors = weights_of(b)
    name = "base_model.model.classifier.weight"
    rewrite(b, tensors | {name: 1.5 * tensors[name]})
    found = {tensor.name: tensor.relative for tensor in diff(a, b).tensors}
    assert found.pop(name) == pytest.approx(0.5)
    assert found == {"base_model.model.classifier.bias": 0.0}


def test_a_larger_rank_answers_the_same_and_can_be_trained_and_back_down_it_is_itself(
    make_lora: Make, loaded: Callable[..., Any], ask: Callable[[Any], torch.Tensor], deltas: Deltas, tmp_path: Path
) -> None:
    folder = make_lora(tmp_path / "a", rank=4)
    up = resize(folder, tmp_path / "up", rank=7)
    assert up.error == pytest.approx(0, abs=1e-12)  # float64's rounding of the difference
    assert (ask(loaded(tmp_path / "up")) - ask(loaded(folder))).abs().max() < CLOSE
    grown = weights_of(tmp_path / "up")
    assert bool((grown[f"base_model.model.{QUERY}.lora_B.weight"][:, 4:] == 0).all())
    assert bool((grown[f"base_model.model.{QUERY}.lora_A.weight"][4:] != 0).any())  # both zero would never move
    down = resize(tmp_path / "up", tmp_path / "down", rank=4)
    assert down.error == pytest.approx(0, abs=1e-6)
    one, other = deltas(folder), deltas(tmp_path / "down")
    assert max(float((one[path] - other[path]).abs().max()) for path in one) < CLOSE
    assert diff(folder, tmp_path / "down").config == {}


def test_a_smaller_rank_loses_the_tail_of_the_spectrum(make_lora: Make, deltas: Deltas, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "a", rank=4, target_modules=["q_proj"], layers_to_transform=[0])
    set_spectrum(folder, QUERY, [4.0, 2.0, 1.0, 0.5])
    report = resize(folder, tmp_path / "out", rank=2)
    assert report.error == pytest.approx(math.sqrt((1 + 0.25) / (16 + 4 + 1 + 0.25)), rel=1e-4)
    assert report == ResizeReport.model_validate_json((tmp_path / "out" / "resize_report.json").read_text())
    kept = torch.linalg.svdvals(deltas(tmp_path / "out")[QUERY])
    assert kept[:2].tolist() == pytest.approx([2 * 4.0, 2 * 2.0], rel=1e-4)  # times alpha / rank, as before
    assert (report.ranks_before, report.rank) == ((4,), 2)
    assert report.num_params == report.num_params_before // 2


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_alpha": 6},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}},
    ],
    ids=["rslora", "patterns"],
)
def test_the_scaling_of_each_module_stays(settings: dict[str, Any], make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "a", rank=4, **settings)
    resize(folder, tmp_path / "out", rank=3)
    before, after = inspect(folder).modules, inspect(tmp_path / "out").modules
    assert [module.scaling for module in after] == pytest.approx([module.scaling for module in before])
    assert {module.rank for module in after} == {3}


def test_dora_keeps_its_magnitudes(
    make_peft: Make, loaded: Callable[..., Any], ask: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, use_dora=True, task_type="CAUSAL_LM", target_modules=["q_proj"])
    folder = make_peft(tmp_path / "dora", config)
    report = resize(folder, tmp_path / "up", rank=4)
    assert (ask(loaded(tmp_path / "up")) - ask(loaded(folder))).abs().max() < 1e-4
    assert "the error is that of B A" in report.notes[0]
    assert inspect(tmp_path / "up").peft_type == "LORA"


def test_the_score_before_and_after_is_measured(
    make_lora: Make, chat_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_lora(tmp_path / "a")
    recipe = chat_recipe()
    report = resize(folder, tmp_path / "out", rank=4, on=[recipe])
    assert [row.name for row in report.scores] == ["before", "after"]
    before, after = (row.scores["chat talks"] for row in report.scores)
    assert before.n == after.n == 8
    assert before.loss == pytest.approx(after.loss, rel=1e-6)  # nothing was cut off
    cut = resize(folder, tmp_path / "cut", rank=1, on=[recipe])
    assert abs(cut.scores[1].scores["chat talks"].loss - before.loss) > 1e-3


def test_what_cannot_be_resized_is_refused_and_leaves_nothing(make_peft: Make, make_lora: Make, tmp_path: Path) -> None:
    task = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    pissa = make_peft(tmp_path / "pissa", LoraConfig(r=2, init_lora_weights="pissa", **task))
    ia3 = make_peft(tmp_path / "ia3", IA3Config(feedforward_modules=[], **task))
    plain = make_lora(tmp_path / "plain")
    for folder, rank, told in ((pissa, 1, "frozen weights"), (ia3, 1, "not made of B and A")):
        with pytest.raises(MethodError, match=told):
            resize(folder, tmp_path / "out", rank=rank)
    for rank in (0, 33):
        with pytest.raises(MethodError, match="ranks 1 to 32"):
            resize(plain, tmp_path / "out", rank=rank)
    with pytest.raises(OutputError, match="is not empty"):
        resize(plain, plain, rank=2)
    with pytest.raises(InputError, match="neither a finished run"):
        resize(tmp_path, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_resized_adapter_inside_a_run_s_folder_is_not_taken_for_the_run_s_own(
    classify_recipe: Any, tmp_path: Path
) -> None:
    train(classify_recipe("training.max_steps=1"), tmp_path / "run")
    resize(tmp_path / "run", tmp_path / "run" / "small", rank=2)
    assert inspect(tmp_path / "run" / "small").training is None
    assert inspect(tmp_path / "run").ranks == (16,)


def test_the_verbs_print_one_document_or_what_a_person_reads(
    make_lora: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out = make_lora(tmp_path / "a"), make_lora(tmp_path / "b", seed=2), tmp_path / "out"
    verbs = {
        "inspect": (["inspect", str(a)], "effective rank"),
        "diff": (["diff", str(a), str(b)], "cosine"),
        "resize": (["resize", str(a), "--rank", "2", "--out"], "of the delta's norm"),
    }
    for verb, (given, told) in verbs.items():
        more = [[str(out / "json")], [str(out / "table")]] if verb == "resize" else [[], []]
        assert main([*given, *more[0], "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
        assert main([*given, *more[1]]) == 0
        assert told in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "neither a finished run" in capsys.readouterr().err

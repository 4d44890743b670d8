"""Combining adapters: PEFT's formulas, identities, what order may not change, and every wrong input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from peftkit.backbones.spec import Head
from peftkit.cli import main
from peftkit.deploy import combine as combining
from peftkit.deploy.arithmetic import Arithmetic, combine_tensors
from peftkit.deploy.combine import CombineReport, combine
from peftkit.deploy.lowrank import Factors, distance, nearest
from peftkit.deploy.merge import merge
from peftkit.deploy.mixing import How, Mix, Space
from peftkit.errors import BackboneError, InputError, MethodError, OutputError
from peftkit.recipe import build_recipe
from peftkit.run import train

Make = Callable[..., Path]
Deltas = Callable[[Path], dict[str, torch.Tensor]]
SENTIMENT = Head("classification", ("bad", "good"), "single_label_classification")
CLOSE = 1e-5
"""Float32 sums of a few products of order 1."""


def close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(bool(((one[n] - other[n]).abs() < CLOSE).all()) for n in one)


def mixed(parts: list[Path], out: Path, how: Mix, **settings: Any) -> CombineReport:
    return combine(parts, out, how, on=[], **settings)


def every_other_entry(shares: torch.Tensor, **settings: Any) -> torch.Tensor:
    """In place of a draw: a mask that both sides see alike."""
    return (torch.arange(shares.numel()).view(shares.shape) % 2 == 0).to(shares.dtype)


@pytest.fixture(scope="module")
def pair(make_lora: Make, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one rank, of different scalings."""
    folder = tmp_path_factory.mktemp("pair")
    return [make_lora(folder / "a", seed=1), make_lora(folder / "b", seed=2, lora_alpha=3)]


PEFT_NAMES: list[tuple[str, How, Space]] = [
    ("linear", "linear", "factors"),
    ("ties", "ties", "factors"),
    ("dare_linear", "dare", "factors"),
    ("dare_ties", "dare-ties", "factors"),
    ("magnitude_prune", "magnitude", "factors"),
    ("cat", "cat", "deltas"),
    ("svd", "svd", "deltas"),
    ("ties_svd", "ties", "deltas"),
    ("dare_linear_svd", "dare", "deltas"),
    ("dare_ties_svd", "dare-ties", "deltas"),
    ("magnitude_prune_svd", "magnitude", "deltas"),
]


@pytest.mark.parametrize(("name", "how", "space"), PEFT_NAMES)
def test_every_combination_is_the_one_that_peft_makes(
    name: str,
    how: How,
    space: Space,
    pair: list[Path],
    loaded: Callable[..., Any],
    deltas: Deltas,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "bernoulli", every_other_entry)
    density = None if how in ("linear", "cat", "svd") else 0.4
    report = mixed(pair, tmp_path / "out", Mix(how, (0.7, 0.4), space, density))
    model = loaded(*pair)
    model.add_weighted_adapter(["0", "1"], [0.7, 0.4], "mixed", combination_type=name, density=density)
    theirs = {
        path.removeprefix("base_model.model."): layer.get_delta_weight("mixed").detach()
        for path, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert close(deltas(tmp_path / "out"), theirs)
    assert report.rank == model.peft_config["mixed"].r


def test_peft_s_linear_is_further_from_the_weighted_sum_than_svd_at_the_same_rank(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    parts = [make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)]
    factors = mixed(parts, tmp_path / "factors", Mix("linear", space="factors"))
    nearest_one = mixed(parts, tmp_path / "svd", Mix("svd"))
    exact = {path: (delta + deltas(parts[1])[path]) / 2 for path, delta in deltas(parts[0]).items()}
    found = deltas(tmp_path / "factors")
    missing = math.sqrt(sum(float((exact[path] - found[path]).square().sum()) for path in exact))
    whole = math.sqrt(sum(float(delta.square().sum()) for delta in exact.values()))
    assert factors.error == pytest.approx(missing / whole, rel=1e-4)
    assert factors.rank == nearest_one.rank == 4
    assert 0 < (nearest_one.error or 0) < (factors.error or 0)


def test_one_part_of_weight_one_is_itself(pair: list[Path], deltas: Deltas, tmp_path: Path) -> None:
    for how in get_args(How):
        density = None if how in ("linear", "svd", "cat") else 1.0
        report = mixed(pair[:1], tmp_path / how, Mix(how, (1.0,), density=density))
        assert close(deltas(tmp_path / how), deltas(pair[0])), how
        assert report.rank == 4
        assert (report.error or 0) < 1e-6  # float32 holds seven digits


def test_the_order_of_parts_does_not_matter(pair: list[Path], make_lora: Make, deltas: Deltas, tmp_path: Path) -> None:
    a, b, c = *pair, make_lora(tmp_path / "c", seed=3)
    spaces: dict[Space, list[How]] = {"deltas": list(get_args(How)), "factors": list(get_args(Arithmetic))}
    for space, how in ((space, how) for space, hows in spaces.items() for how in hows):
        one, other = tmp_path / f"{how} {space}", tmp_path / f"{how} {space} turned"
        mixed([a, b, c], one, Mix(how, (0.5, 0.3, 0.2), space))
        mixed([c, a, b], other, Mix(how, (0.2, 0.5, 0.3), space))
        assert close(deltas(one), deltas(other)), (how, space)


def test_concatenated_adapters_answer_like_both_at_once(
    make_lora: Make, loaded: Callable[..., Any], ask: Callable[[Any], torch.Tensor], tmp_path: Path
) -> None:
    parts = [make_lora(tmp_path / "a"), make_lora(tmp_path / "b", seed=2, rank=2, target_modules=["q_proj", "o_proj"])]
    report = mixed(parts, tmp_path / "out", Mix("cat", (1.0, 1.0)))
    both = loaded(*parts)
    both.base_model.set_adapter(["0", "1"])
    one, alone = ask(loaded(tmp_path / "out")), ask(loaded(parts[0]))
    assert (one - ask(both)).abs().max() < 1e-4 < 1e-2 < (one - alone).abs().max()
    assert report.rank == 4 + 2
    assert report.modules == 2 * 4


@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties"])
def test_an_adapter_less_itself_is_the_base(
    how: How,
    make_lora: Make,
    loaded: Callable[..., Any],
    bare_model: Any,
    ask: Callable[[Any], torch.Tensor],
    tmp_path: Path,
) -> None:
    part = make_lora(tmp_path / "a")
    mixed([part, part], tmp_path / "out", Mix(how, (1.0, -1.0)))
    assert (ask(loaded(tmp_path / "out")) - ask(bare_model)).abs().max() < CLOSE
    assert (ask(loaded(part)) - ask(bare_model)).abs().max() > 1e-2


def test_subtracting_takes_a_part_out_of_a_sum(make_lora: Make, deltas: Deltas, tmp_path: Path) -> None:
    a, b = make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)
    mixed([a, b], tmp_path / "sum", Mix("linear", (1.0, 1.0)))
    mixed([tmp_path / "sum", b], tmp_path / "rest", Mix("linear", (1.0, -1.0)))
    assert close(deltas(tmp_path / "rest"), deltas(a))


def test_the_sum_takes_no_more_ranks_than_it_needs(make_lora: Make, tmp_path: Path) -> None:
    a, b = make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)
    assert mixed([a, a], tmp_path / "same", Mix("linear")).rank == 4
    assert mixed([a, b], tmp_path / "different", Mix("linear")).rank == 8


def test_ties_elects_the_sign_of_the_larger_sum_and_averages_those_who_have_it() -> None:
    parts = [torch.tensor([4.0, -1.0, 2.0, 0.1]), torch.tensor([2.0, 3.0, -5.0, 0.2])]
    # density 3/4 drops 0.1 and 0.2; the sums 6, 2, -3 elect +, +, -; so (4 + 2) / 2, 3 of the second, -5 of the second
    assert combine_tensors("ties", parts, [1, 1], density=0.75).tolist() == [3, 3, -5, 0]
    # 1 and -1 draw
    assert combine_tensors("ties", [torch.tensor([1.0]), torch.tensor([-1.0])], [1, 1]).tolist() == [0]
    # the weights count after the election: (2 x 4 + 0.5 x 2) / 2
    assert combine_tensors("ties", parts, [2, 0.5], density=0.75).tolist() == [4.5, 1.5, -2.5, 0]


def test_in_ties_a_negative_part_votes_for_its_opposite_and_a_part_of_weight_zero_not_at_all() -> None:
    parts = [torch.tensor([4.0, -1.0]), torch.tensor([2.0, 3.0])]
    # 4 - 2 and -1 - 3 elect + and -: 4 of the first alone, (-1 - 3) / 2 of both
    assert combine_tensors("ties", parts, [1, -1]).tolist() == [4, -2]
    assert combine_tensors("ties", parts, [1, 0]).tolist() == [4, -1]


def test_magnitude_keeps_the_largest_entries_of_each_part() -> None:
    parts = [torch.tensor([4.0, -1.0, 0.5, 0.1]), torch.tensor([0.1, 0.2, -3.0, 2.0])]
    assert combine_tensors("magnitude", parts, [1, 10], density=0.5).tolist() == [4, -1, -30, 20]


def test_dare_keeps_the_expectation() -> None:
    tensor = torch.tensor([1.0, -2.0, 3.0])
    draws = [combine_tensors("dare", [tensor], [1.0], density=0.25, seeds=[seed]) for seed in range(4000)]
    assert {float(value) for value in draws[0] / tensor} <= {0.0, 4.0}
    # the mean of n draws of 1/p with probability p has deviation sqrt((1 - p) / (p n)) = 0.027; five of these
    assert (torch.stack(draws).mean(0) / tensor - 1).abs().max() < 5 * math.sqrt(0.75 / (0.25 * 4000))


def test_dare_draws_by_its_seed(make_lora: Make, deltas: Deltas, tmp_path: Path) -> None:
    parts = [make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)]
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        assert mixed(parts, tmp_path / name, Mix("dare", seed=seed)).seed == seed
    one, again, other = (deltas(tmp_path / name) for name in ("one", "again", "other"))
    assert all(bool(one[path].equal(again[path])) for path in one)
    assert not close(one, other)


def test_svd_is_exact_at_full_rank_and_loses_the_tail_of_the_spectrum_below(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    parts = [make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)]
    assert (mixed(parts, tmp_path / "full", Mix("svd", (1.0, 1.0), rank=8)).error or 0) < 1e-6
    exact = {path: delta + deltas(parts[1])[path] for path, delta in deltas(parts[0]).items()}
    assert close(deltas(tmp_path / "full"), exact)
    report = mixed(parts, tmp_path / "cut", Mix("svd", (1.0, 1.0), rank=3))
    spectra = {path: torch.linalg.svdvals(delta) for path, delta in exact.items()}
    for path, singular in spectra.items():
        assert report.module_errors[path] == pytest.approx(float(singular[3:].norm() / singular.norm()), rel=1e-4)
    lost = sum(float(singular[3:].square().sum()) for singular in spectra.values())
    whole = sum(float(singular.square().sum()) for singular in spectra.values())
    assert report.error == pytest.approx(math.sqrt(lost / whole), rel=1e-4)


def test_ranks_alphas_patterns_and_rslora_of_the_parts_are_heeded(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    parts = [
        make_lora(tmp_path / "plain", seed=1, rank=2, lora_alpha=7),
        make_lora(tmp_path / "rslora", seed=2, rank=4, use_rslora=True),
        make_lora(
            tmp_path / "patterns",
            seed=3,
            rank=2,
            rank_pattern={"q_proj": 3},
            alpha_pattern={"layers.1.self_attn.v_proj": 9},
        ),
    ]
    mixed(parts, tmp_path / "out", Mix("linear", (1.0, 2.0, -1.0)))
    one, two, three = map(deltas, parts)
    assert close(deltas(tmp_path / "out"), {path: one[path] + 2 * two[path] - three[path] for path in one})


def test_parts_of_different_targets_are_combined_where_each_has_something(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    a, b = (
        make_lora(tmp_path / "a", target_modules=["q_proj"]),
        make_lora(tmp_path / "b", seed=2, target_modules=["up_proj"]),
    )
    report = mixed([a, b], tmp_path / "out", Mix("linear", (0.5, 2.0)))
    expected = {path: 0.5 * delta for path, delta in deltas(a).items()}
    assert close(deltas(tmp_path / "out"), expected | {path: 2 * delta for path, delta in deltas(b).items()})
    assert report.rank == 4


@pytest.mark.parametrize("kind", ["dora", "loha", "pissa", "ia3"])
def test_a_method_that_is_no_plain_lora_is_combined_through_the_weights_it_folds_into(
    kind: str,
    make_peft: Make,
    make_lora: Make,
    loaded: Callable[..., Any],
    bare_model: Any,
    ask: Callable[[Any], torch.Tensor],
    tmp_path: Path,
) -> None:
    task = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    configs: dict[str, Any] = {
        "dora": lambda: LoraConfig(r=2, use_dora=True, **task),
        "pissa": lambda: LoraConfig(r=2, init_lora_weights="pissa", **task),
        "loha": lambda: LoHaConfig(r=2, **task),
        "ia3": lambda: IA3Config(feedforward_modules=[], **task),
    }
    part = make_peft(tmp_path / "odd", configs[kind]())
    report = mixed([part], tmp_path / "alone", Mix("linear", (1.0,), rank=32))  # 32 is the whole of a 32 x 32 weight
    expected = ask(loaded(part))
    assert (ask(loaded(tmp_path / "alone")) - expected).abs().max() < 1e-4 < (ask(bare_model) - expected).abs().max()
    assert any("folded weights less the base's" in note for note in report.notes)
    plain = make_lora(tmp_path / "plain", target_modules=["q_proj", "v_proj"])
    assert mixed([part, plain], tmp_path / "both", Mix("ties", rank=4)).rank == 4
    with pytest.raises(InputError, match="no rank of its own"):
        mixed([part, plain], tmp_path / "none", Mix("svd"))
    with pytest.raises(InputError, match="cat needs parts with factors"):
        mixed([part, plain], tmp_path / "none", Mix("cat"))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft, of any norm it has not listed
def test_what_a_lora_has_no_place_for_is_refused(make_peft: Make, make_lora: Make, tmp_path: Path) -> None:
    from peft import LNTuningConfig

    norms = make_peft(tmp_path / "norms", LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]))
    with pytest.raises(MethodError, match="for which a LoRA has no place"):
        mixed([norms, make_lora(tmp_path / "a")], tmp_path / "out", Mix("svd", rank=4))
    prompt = make_peft(tmp_path / "prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(MethodError, match="nothing to add up"):
        mixed([prompt, make_lora(tmp_path / "a")], tmp_path / "out", Mix("svd", rank=4))


def test_the_output_is_an_ordinary_adapter_with_its_report_and_merges(
    make_lora: Make, deltas: Deltas, tmp_path: Path
) -> None:
    parts = [make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)]
    report = mixed(parts, tmp_path / "out", Mix("linear", (0.6, 0.4)))
    written = CombineReport.model_validate_json((tmp_path / "out" / "combine_report.json").read_text())
    assert written == report
    assert [(part.name, part.rank, part.weight) for part in report.parts] == [("a", 4, 0.6), ("b", 4, 0.4)]
    assert report.parts[0].digest != report.parts[1].digest
    assert report.base_digest == json.loads((parts[0] / "base.json").read_text())["weights_digest"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj", "v_proj"]
    assert config["lora_alpha"] == config["r"] == 8
    merged = merge(tmp_path / "out", tmp_path / "merged")
    assert merged.base.recognised_by == "weights"
    assert merged.verification.passed


def test_weights_are_equal_where_they_are_not_said(make_lora: Make, tmp_path: Path) -> None:
    parts = [make_lora(tmp_path / "a", seed=1), make_lora(tmp_path / "b", seed=2)]
    assert [part.weight for part in mixed(parts, tmp_path / "mean", Mix("linear")).parts] == [0.5, 0.5]
    assert [part.weight for part in mixed(parts, tmp_path / "ties", Mix("ties")).parts] == [1.0, 1.0]


def test_heads_that_differ_need_a_choice(make_lora: Make, tiny_bert: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "base": tiny_bert, "head": SENTIMENT}
    parts = [make_lora(tmp_path / name, seed=seed, **settings) for name, seed in (("a", 1), ("b", 2))]
    with pytest.raises(InputError, match="--head 1 to 2, or --head mean"):
        mixed(parts, tmp_path / "out", Mix("linear"))
    key = "base_model.model.classifier.weight"
    one, two = (load_file(part / "adapter_model.safetensors")[key] for part in parts)
    for choice, expected in (("1", one), ("b", two), ("mean", 0.25 * one + 0.75 * two)):
        report = mixed(parts, tmp_path / f"of {choice}", Mix("linear", (0.25, 0.75)), head=choice)
        found = load_file(tmp_path / f"of {choice}" / "adapter_model.safetensors")
        assert (found[key] - expected).abs().max() < CLOSE
        assert json.loads((tmp_path / f"of {choice}" / "head.json").read_text())["labels"] == ["bad", "good"]
        assert report.head != "all parts agree"
    with pytest.raises(InputError, match="none of the parts"):
        mixed(parts, tmp_path / "out", Mix("linear"), head="3")
    with pytest.raises(InputError, match="add up to more than 0"):
        mixed(parts, tmp_path / "out", Mix("linear", (1.0, -1.0)), head="mean")
    assert mixed([parts[0], parts[0]], tmp_path / "same", Mix("linear")).head == "all parts agree"


def test_heads_of_other_labels_have_no_mean(make_lora: Make, tiny_bert: Path, tmp_path: Path) -> None:
    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "base": tiny_bert}
    turned = Head("classification", ("good", "bad"), "single_label_classification")
    parts = [make_lora(tmp_path / "a", head=SENTIMENT, **settings), make_lora(tmp_path / "b", head=turned, **settings)]
    with pytest.raises(InputError, match="the same labels in the same order"):
        mixed(parts, tmp_path / "out", Mix("linear"), head="mean")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (Mix("linear", (1.0,)), "1 numbers for 2 adapters"),
        (Mix("linear", (0.0, 0.0)), "not all zero"),
        (Mix("linear", (math.nan, 1.0)), "must be finite"),
        (Mix("ties", density=0.0), "above 0 and at most 1"),
        (Mix("ties", density=20.0), "above 0 and at most 1"),
        (Mix("svd", rank=0), "must be 1 or more"),
        (Mix("linear", density=0.5), "--density would be ignored by --how linear"),
        (Mix("ties", seed=1), "--seed would be ignored by --how ties"),
        (Mix("cat", rank=4), "--rank would be ignored by --how cat"),
        (Mix("ties", rank=4, space="factors"), "in factors, which keeps the rank"),
        (Mix("svd", space="factors"), "--space factors would be ignored"),
        (Mix("linear", space="factors"), "plain LoRA parts of one rank"),
    ],
)
def test_a_wrong_setting_is_one_message_and_leaves_nothing(
    how: Mix, told: str, make_lora: Make, tmp_path: Path
) -> None:
    parts = [make_lora(tmp_path / "a", rank=2), make_lora(tmp_path / "b", rank=4)]
    with pytest.raises(InputError, match=told) as caught:
        mixed(parts, tmp_path / "out", how)
    assert caught.value.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_parts_of_different_bases_are_refused(
    make_lora: Make, tiny_llama: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other-llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.get_input_embeddings().weight.data[0, 0] += 1
    model.save_pretrained(other)
    for file in tiny_llama.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    first = make_lora(tmp_path / "a")
    with pytest.raises(BackboneError, match="weights_digest"):
        mixed([first, make_lora(tmp_path / "b", base=other)], tmp_path / "out", Mix("linear"))
    with pytest.raises(BackboneError, match="other names"):
        mixed([first, make_lora(tmp_path / "c", base=other, identity=False)], tmp_path / "out", Mix("linear"))
    bert = make_lora(tmp_path / "d", base=tiny_bert, head=SENTIMENT, task_type="SEQ_CLS", target_modules=["query"])
    with pytest.raises(BackboneError, match="config_digest"):
        mixed([first, bert], tmp_path / "out", Mix("linear"))


def test_parts_that_name_one_base_and_have_other_shapes_are_refused(make_lora: Make, tmp_path: Path) -> None:
    parts = [make_lora(tmp_path / "a", identity=False), make_lora(tmp_path / "b", identity=False)]
    path = parts[1] / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file(tensors | {key: torch.zeros(4, 48)}, path, {"format": "pt"})
    with pytest.raises(BackboneError, match=r"a 32 x 32, b 32 x 48"):
        mixed(parts, tmp_path / "out", Mix("linear"))


def test_a_note_says_what_of_the_base_is_not_proven(make_lora: Make, tmp_path: Path) -> None:
    parts = [make_lora(tmp_path / "a"), make_lora(tmp_path / "b", identity=False)]
    known = json.loads((parts[0] / "base.json").read_text())
    (parts[0] / "base.json").write_text(json.dumps(known | {"name": "a short name"}))  # the path stays in the config
    assert "its weights are not compared" in mixed(parts, tmp_path / "out", Mix("linear")).notes[0]


def test_an_adapter_that_diverged_and_a_folder_that_is_none_are_refused(
    make_lora: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    part, broken = make_lora(tmp_path / "a"), make_lora(tmp_path / "b")
    path = broken / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = math.inf
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        mixed([part, broken], tmp_path / "out", Mix("linear"))
    with pytest.raises(MethodError, match="a whole model"):
        mixed([part, tiny_llama], tmp_path / "out", Mix("linear"))
    with pytest.raises(InputError, match="neither a finished run"):
        mixed([part, tmp_path / "nowhere"], tmp_path / "out", Mix("linear"))


def test_an_output_in_use_is_left_alone_and_an_interruption_leaves_nothing(
    make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = make_lora(tmp_path / "a")
    with pytest.raises(OutputError, match="is not empty"):
        mixed([part], part, Mix("linear"))

    def interrupt(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(combining, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mixed([part], tmp_path / "out", Mix("linear"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_large_matrix_is_cut_as_well_as_by_its_whole_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(700, 700, generator=generator))[0] for _ in range(2))
    singular = torch.arange(1, 701).float() ** -0.5  # slow to decay: the hard case of a range finder
    matrix = left * singular @ right
    found = distance(matrix, nearest(matrix, 8))
    assert found == pytest.approx(float(singular[8:].norm()), rel=1e-3)


def test_a_sum_of_factors_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Factors, "dense", lambda self: pytest.fail("the matrix was formed"))
    up, down = torch.randn(50, 3), torch.randn(3, 40)
    assert distance(Factors(up, down), nearest(Factors(up, down), 3)) < 1e-4


@pytest.fixture(scope="module")
def runs(tiny_bert: Path, reviews_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one task, a few steps each."""
    folder, source = tmp_path_factory.mktemp("runs"), str(reviews_file)
    content = {
        "backbone": {"name": str(tiny_bert), "dtype": "float32"},
        "method": "lora",
        "task": "classify",
        "data": {"train": source, "validation": source, "test": source},
        "training": {"max_steps": 3, "learning_rate": 0.02},
    }
    for seed in (0, 1):
        train(build_recipe({**content, "seed": seed}), folder / f"seed{seed}")
    return [folder / "seed0", folder / "seed1"]


def test_runs_are_scored_on_their_own_validation_split_beside_the_combination(runs: list[Path], tmp_path: Path) -> None:
    report = combine(runs, tmp_path / "out", Mix("linear"), head="mean")
    records = [json.loads((run / "record.json").read_text()) for run in runs]
    assert [row.name for row in report.scores] == ["seed0", "seed1", "linear"]
    (label,) = report.scores[0].scores
    assert label == "classify reviews"
    for row, record in zip(report.scores, records, strict=False):
        assert row.scores[label].value == record["validation_metrics"]["accuracy"]["value"]
        assert row.scores[label].loss == pytest.approx(record["loss"]["validation"], rel=1e-5)
    combined = report.scores[2].scores[label]
    costs = {row.name: row.scores[label].value - combined.value for row in report.scores[:2]}
    assert report.costs == {label: pytest.approx(costs)}
    alone = combine(runs[:1], tmp_path / "alone", Mix("linear")).scores
    assert alone[1].scores[label].loss == pytest.approx(alone[0].scores[label].loss, rel=1e-5)


def test_a_search_finds_weights_that_cost_no_more_than_the_best_part(runs: list[Path], tmp_path: Path) -> None:
    found = [
        combine(runs, tmp_path / name, Mix("linear", seed=3), head="1", trials=6).search for name in ("one", "again")
    ]
    assert found[0] is not None
    assert found[0] == found[1]  # one seed, one search
    assert len(found[0].trials) == 6
    assert [trial.weights for trial in found[0].trials[:3]] == [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    assert found[0].best.cost == min(trial.cost for trial in found[0].trials) <= found[0].trials[1].cost
    report = CombineReport.model_validate_json((tmp_path / "one" / "combine_report.json").read_text())
    assert tuple(part.weight for part in report.parts) == found[0].best.weights
    best = max(row.scores["classify reviews"].value for row in report.scores[:2])
    combined = report.scores[2].scores["classify reviews"].value
    assert found[0].best.cost == pytest.approx((best - combined) / best)  # the model in the search was the one on disk
    assert [row.name for row in report.test_scores] == ["seed0", "seed1", "linear"]


def test_a_search_without_a_task_or_with_too_few_trials_is_refused(
    runs: list[Path], make_lora: Make, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="needs a task"):
        combine([make_lora(tmp_path / "a")], tmp_path / "out", Mix("linear"), trials=10)
    with pytest.raises(InputError, match="too few"):
        combine(runs, tmp_path / "out", Mix("linear"), head="1", trials=2)
    with pytest.raises(InputError, match="--weights would be ignored"):
        combine(runs, tmp_path / "out", Mix("linear", (1.0, 1.0)), head="1", trials=10)
    assert not (tmp_path / "out").exists()


def test_tasks_of_different_heads_are_scored_where_the_head_fits(
    runs: list[Path], classify_recipe: Any, reviews_file: Path, tmp_path: Path
) -> None:
    topics = tmp_path / "topics.jsonl"
    topics.write_text(reviews_file.read_text().replace('"good"', '"x"').replace('"bad"', '"y"'))
    splits = [f"data.{split}={topics}" for split in ("train", "validation", "test")]
    train(classify_recipe("training.max_steps=3", *splits), tmp_path / "topics")
    report = combine([runs[0], tmp_path / "topics"], tmp_path / "out", Mix("linear"), head="topics")
    assert [sorted(row.scores) for row in report.scores] == [
        ["classify reviews"],
        ["classify topics"],
        ["classify topics"],
    ]
    assert list(report.costs) == ["classify topics"]


def test_the_verb_prints_one_document_or_a_table(
    make_lora: Make, chat_recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [str(make_lora(tmp_path / "a", seed=1)), str(make_lora(tmp_path / "b", seed=2))]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(chat_recipe().to_yaml())
    given = ["combine", *parts, "--weights=0.7,-0.3", "--on", str(recipe)]
    assert main([*given, "--out", str(tmp_path / "one"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [part["weight"] for part in document["parts"]] == [0.7, -0.3]
    assert [row["name"] for row in document["scores"]] == ["a", "b", "linear"]
    assert main([*given, "--out", str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "chat talks, loss" in shown
    assert "above 0 is worse" in shown
    assert main(["combine", *parts, "--out", str(tmp_path / "one")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["combine", *parts, "--out", str(tmp_path / "three"), "--trials", "5"]) == 2
    assert "ignored without --search" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["combine", *parts, "--out", str(tmp_path / "three"), "--weights", "a,b"])
    assert stop.value.code == 2
    assert "no list of numbers" in capsys.readouterr().err


def test_plain_peft_reads_the_result_onto_a_classifier(make_lora: Make, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    settings = {"target_modules": ["query"], "task_type": "SEQ_CLS", "base": tiny_bert, "head": SENTIMENT}
    part = make_lora(tmp_path / "a", **settings)
    mixed([part], tmp_path / "out", Mix("linear", (1.0,)))
    found = []
    for folder in (part, tmp_path / "out"):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.inference_mode():
            found.append(model(torch.tensor([[3, 5, 8, 9]])).logits)
    assert (found[0] - found[1]).abs().max() < CLOSE

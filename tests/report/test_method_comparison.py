"""Result files of PEFT's method_comparison: read as rows, written from rows, and refused with one message each."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_up import record, row, trained
from rich.console import Console

from peftkit.cli import main
from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.report.comparison import compare_rows
from peftkit.report.document import write_report
from peftkit.report.method_comparison import SOURCE, caveats, read_results
from peftkit.report.peft_layout import UPPER_BOUNDS, write_results
from peftkit.report.rows import CellRow, summarise
from peftkit.report.tables import render_outside


def published(*, right: int = 636, status: str = "success", older: bool = False, **changed: Any) -> dict[str, Any]:
    """A file of the layout, its logs cut short; the numbers are those of `lora--llama-3.2-3B-rank32`, June 2025."""
    memory, card = ("cuda_memory", "gpu") if older else ("accelerator_memory", "accelerator")
    lines = [
        {"step": 250, "valid accuracy": 0.34, "train loss": 0.98, "train samples": 1000, "train time": 31.4,
         "eval time": 11.3, "tokens / sec": 6743.7, "elapsed time": 94.7},
        {"step": 500, "valid accuracy": 0.5, "train loss": 0.61, "train samples": 2000, "train time": 30.6,
         "eval time": 11.3, "tokens / sec": 6776.3, "elapsed time": 182.7},
    ]  # fmt: skip
    test = {"step": 500, "test accuracy": right / 1319, "train loss": 0.61, "train samples": 2000}
    document: dict[str, Any] = {
        "run_info": {
            "created_at": "2025-06-19T19:15:35+00:00",
            "total_time": 1993.49,
            "experiment_name": "lora/llama-3.2-3B-rank32",
            "peft_branch": "main",
            "train_config": {
                "model_id": "meta-llama/Llama-3.2-3B", "dtype": "bfloat16", "batch_size": 4, "seed": 0,
                "optimizer_kwargs": {"lr": 0.0001, "weight_decay": 0.1},
            },
            "peft_config": {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "target_modules": ["v_proj", "q_proj"]},
            "error_msg": "" if status == "success" else "CUDA out of memory. Tried to allocate 2.00 GiB",
        },
        "train_info": {
            f"{memory}_reserved_avg": 11868689976, f"{memory}_max": 22273851392, f"{memory}_reserved_99th": 17710763212,
            "train_time": 1796.19, "file_size": 36715216, "num_trainable_params": 9175040,
            "num_total_params": 3221924864, "status": status,
            "metrics": [*lines, *([test | {"train total tokens": 419805}] if status == "success" else [])],
        },
        "meta_info": {
            "model_info": {"sha": "13afe51", "created_at": "2024-09-18T15:23:48+00:00"},
            "dataset_info": {"metamath": {"sha": "aa4f34d"}, "gsm8k": {"sha": "e53f048"}},
            "package_info": {"peft-version": "0.15.2.dev0", "torch-version": "2.7.1+cu126", "torch-commit-hash": None},
            "system_info": {"system": "Linux", "release": "6.8.0", "machine": "x86_64", card: "NVIDIA L40S"},
            "pytorch_info": "PyTorch built with: ...",
        },
    }  # fmt: skip
    for key, value in changed.items():
        part, name = key.split("__")
        document[part][name] = value
    return document


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write_json(folder / "lora--llama-3.2-3B-rank32.json", published())
    full = published(right=700, older=True, run_info__experiment_name="full-finetuning/llama-3.2-3B-lr_0.00001")
    full["run_info"]["peft_config"] = None
    write_json(folder / "full-finetuning--llama-3.2-3B-lr_0.00001.json", full)
    oom = published(status="canceled", run_info__experiment_name="oft/llama-3.2-3B-rank32")
    write_json(folder / "oft--llama-3.2-3B-rank32.json", oom)
    return folder


def test_both_layouts_are_read_with_score_sizes_and_time(results: Path) -> None:
    rows, faults = read_results(results)
    assert faults == []
    full, lora, oft = rows
    assert full.record is not None
    assert (full.variant, full.record.label) == ("full-finetuning/llama-3.2-3B-lr_0.00001", "full")
    (summary,) = summarise([lora])
    assert (summary.main, summary.trainable, summary.artifact_bytes) == ("accuracy", 9175040, 36715216)
    assert (summary.peak_bytes, summary.memory_bytes) == (22273851392, None)  # nothing says what was held before
    assert summary.train_seconds == pytest.approx(31.4 + 30.6)
    assert summary.tokens_per_second == pytest.approx(419805 / 62)
    assert full.machine == lora.machine == "NVIDIA L40S"
    assert (oft.status, oft.reason) == ("oom", "CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_interval_is_wilsons_over_the_1319_test_rows(results: Path) -> None:
    (summary,) = summarise([each for each in read_results(results)[0] if each.variant.startswith("lora")])
    score = summary.score
    assert score is not None
    share, n, z = 636 / 1319, 1319, 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert (score.value, score.n) == (pytest.approx(share), 1319)
    assert (score.low, score.high) == (pytest.approx(middle - half, abs=1e-6), pytest.approx(middle + half, abs=1e-6))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[1]", "is no result of method_comparison: it: input should be a valid dictionary"),
        (json.dumps({"run_info": {}, "train_info": {}, "meta_info": {}}), "run_info.experiment_name: field required"),
        (json.dumps(published(train_info__status="done")), "train_info.status: input should be 'success'"),
        (json.dumps(published(train_info__metrics=[])), "its last metrics have no test score"),
        (json.dumps(published(meta_info__dataset_info={"mine": {}})), "does not say how many examples"),
        (json.dumps(published(train_info__metrics=[{"test accuracy": "high"}])), "test accuracy is 'high'"),
    ],
)
def test_each_bad_file_has_one_message_and_the_others_are_read(results: Path, content: str, told: str) -> None:
    (results / "bad.json").write_text(content, encoding="utf-8")
    rows, faults = read_results(results)
    assert len(rows) == 3
    (fault,) = faults
    assert told in fault
    assert fault.startswith(str(results / "bad.json"))


def test_a_folder_without_a_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"It holds no .json file"):
        read_results(tmp_path)
    (tmp_path / "x.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"(?s)holds no result.*\n  - .*x.json is not JSON"):
        read_results(tmp_path)


def test_what_is_not_comparable_is_said(results: Path) -> None:
    rows, _ = read_results(results)
    told = "\n".join(caveats(rows, [row("lora", trained(0.8))]))
    for words in ("one seed each", "nothing can be compared in pairs", "peak reserved by the whole run"):
        assert words in told
    own = trained(0.8).model_copy(
        update={
            "recipe": {"backbone": {"name": "minilm-l6"}, "data": {"test": "mine.csv"}},
            "environment": {"device": "cpu"},
        }
    )
    assert caveats(rows, [row("lora", own)])[:3] == [
        "other backbone: meta-llama/Llama-3.2-3B, and not minilm-l6",
        "other data: gsm8k, and not mine.csv",
        "other card: NVIDIA L40S, and not cpu",
    ]


def test_how_many_cannot_be_told_from_the_best_is_counted(tmp_path: Path) -> None:
    # 700 of 1,319 against so many: the standard error of a difference is about sqrt(2 x 0.25 / 1319) = 0.0195,
    # so that 0.038, or 50 answers, are told apart
    for right in (700, 655, 640):
        name = f"lora/{right}"
        write_json(tmp_path / f"{right}.json", published(right=right, run_info__experiment_name=name))
    rows, _ = read_results(tmp_path)
    assert caveats(rows)[0].startswith("1 of the other 2 accuracies cannot be told from the best, lora/700, at n=1,319")
    assert not any("cannot be told" in each for each in caveats(rows[:1]))


def test_imported_runs_stand_apart_and_take_no_part_in_the_comparison(results: Path, tmp_path: Path) -> None:
    outside, _ = read_results(results)
    own = [row("lora", trained(0.3)), row("full", trained(0.2))]
    assert [each.variant for each in compare_rows(own).differences] == []
    path = write_report(tmp_path / "out", "mine", [*own, *outside])
    text = path.read_text(encoding="utf-8")
    ours, _, theirs = text.partition(f"## {SOURCE}")
    assert "llama-3.2-3B" not in ours
    assert "| lora/llama-3.2-3B-rank32 | 0.482 [0.455, 0.509] | 9.18M |" in theirs
    assert "one seed each" in theirs
    assert (tmp_path / "out" / "results.csv").read_text(encoding="utf-8").count(SOURCE) == 3
    console = Console(width=80, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(render_outside(outside, own))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("20.7 GiB" in line and "lora" in line for line in lines)


def exported(tmp_path: Path) -> tuple[CellRow, Path]:
    own = trained(0.8125, 3).model_copy(
        update={
            "recipe": {
                "backbone": {"name": "minilm-l6", "dtype": "float32"},
                "method": {"kind": "lora", "rank": 8},
                "data": {"train": "train.csv", "test": "test.csv"},
                "training": {"learning_rate": 0.001, "batch_size": 32},
            },
            "artifacts": {"adapter": "adapter"},
            "history": [{"step": 40, "epoch": 1.0, "loss": 0.5, "accuracy": 0.8}],
        }
    )
    own.write(tmp_path / "lora-seed3")
    write_json(tmp_path / "lora-seed3" / "adapter" / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    return CellRow("lora", 3, tmp_path / "lora-seed3", own), tmp_path / "out"


def test_an_exported_run_has_every_key_that_their_table_reads(tmp_path: Path) -> None:
    """The keys and types are those of `preprocess` and `load_df` in `method_comparison/processing.py`."""
    own, out = exported(tmp_path)
    assert write_results([own], out) == []
    found = json.loads((out / "lora--lora-seed3.json").read_text(encoding="utf-8"))
    run, train, meta = found["run_info"], found["train_info"], found["meta_info"]
    last = train["metrics"][-1]
    assert (run["peft_config"]["peft_type"], run["train_config"]["model_id"], train["status"]) == (
        "LORA", "minilm-l6", "success",
    )  # fmt: skip
    for value in (train["accelerator_memory_max"], *(train[name] for name in UPPER_BOUNDS), train["file_size"]):
        assert isinstance(value, int)
    assert (last["test accuracy"], last["train samples"], last["train total tokens"]) == (0.8125, 10, 200)
    assert isinstance(train["train_time"] + run["total_time"], float)
    for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes"):
        assert f"{name}-version" in meta["package_info"]
    assert meta["peftkit"]["upper_bounds"] == list(UPPER_BOUNDS)
    assert {"created_at", "experiment_name", "peft_branch"} <= set(run)


def test_what_is_exported_is_read_back_the_same(tmp_path: Path) -> None:
    own, out = exported(tmp_path)
    write_results([own], out)
    (back,), faults = read_results(out)
    assert faults == []
    (mine,), (theirs,) = summarise([own]), summarise([back])
    assert mine.score is not None
    assert theirs.score is not None
    assert (theirs.score.value, theirs.score.n) == (mine.score.value, mine.score.n)
    for name in ("trainable", "artifact_bytes", "peak_bytes", "train_seconds"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert back.seed == 3
    assert back.record is not None
    assert back.record.recipe["data"] == {"train": "train.csv", "test": "test.csv"}
    assert back.record.history == [{"step": 40, "loss": 0.5, "accuracy": 0.8}]


def test_runs_that_the_layout_has_no_place_for_are_named(tmp_path: Path) -> None:
    own, out = exported(tmp_path)
    rows = [own, row("oft", record(status="oom")), row("zero-shot", record(metrics=trained(0.6).metrics))]
    assert write_results(rows, out) == [
        "oft seed 0: oom",
        "zero-shot seed 0: it trained nothing, or was not scored on a test split",
    ]
    with pytest.raises(InputError, match="no finished run that could be exported"):
        write_results(rows[1:], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_verb_imports_and_exports(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, out = exported(tmp_path / "mine")
    (results / "bad.json").write_text("{", encoding="utf-8")
    assert main(["report", str(own.folder), "--import-peft", str(results), "--export-peft", str(out)]) == 0
    printed = capsys.readouterr()
    assert "not comparable" in printed.out
    assert printed.err.count("left out: ") == 1
    assert (out / "lora--lora-seed3.json").is_file()
    assert main(["report", "--import-peft", str(results), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [each["source"] for each in documents] == [SOURCE] * 3
    assert documents[1]["record"]["throughput"]["train_seconds"] == pytest.approx(62.0)


def test_the_verb_refuses_what_makes_no_sense(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["report"], "report of what?"),
        (["report", "--import-peft", str(results), "--advise"], "--advise needs runs of your own"),
        (["report", "--import-peft", str(results), "--export-peft", "out"], "--export-peft writes runs of your own"),
        (["report", "--import-peft", str(results / "none")], "is not a folder"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err

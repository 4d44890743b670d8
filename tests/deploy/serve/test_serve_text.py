"""An endpoint for text: what clients get is what the model says, whoever else asks at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import LENGTH, Running, alone, ask_all, asked, running

from peftkit.deploy.generate import write_answer
from peftkit.deploy.serve.app import Service
from peftkit.deploy.serve.engine import Ask, BatchedEngine, Engine, SequentialEngine, disagreement, open_engine
from peftkit.deploy.serve.options import Limits
from peftkit.deploy.usable import Usable, open_usable

CLIENTS = 50


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path, in_float32: None) -> Usable:
    return open_usable(tiny_llama)


@pytest.fixture(scope="module")
def expected(tiny: Usable) -> list[str]:
    return alone(tiny, range(CLIENTS))


@pytest.mark.parametrize("stream", [False, True])
def test_fifty_clients_at_once_each_get_their_own_answer(
    tiny_server: Running, expected: list[str], stream: bool
) -> None:
    assert len(set(expected)) > CLIENTS - 3, "the prompts must be told apart by their answers"
    assert ask_all(tiny_server.url, [("tiny", number) for number in range(CLIENTS)], stream=stream) == expected


def test_tokens_are_counted_and_an_answer_cut_off_says_so(tiny_server: Running, tiny: Usable) -> None:
    made = tiny_server.client.chat.completions.create(model="tiny", messages=asked(1), max_tokens=5)
    read = len(tiny.conversation(asked(1)))
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (read, 5, read + 5)
    assert made.choices[0].finish_reason == "length"
    parts = list(
        tiny_server.client.chat.completions.create(
            model="tiny", messages=asked(1), max_tokens=5, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == "length"
    assert parts[-1].choices == []
    assert parts[-1].usage.total_tokens == read + 5
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == made.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(tiny_server: Running, expected: list[str], stream: bool) -> None:
    stop = expected[3][5:9]
    found = ask_all(tiny_server.url, [("tiny", 3)], stream=stream, stop=[stop, "never said"])
    assert found == [expected[3][: expected[3].index(stop)]]


def test_completions_go_on_from_a_text(tiny_server: Running, tiny: Usable) -> None:
    answer = write_answer(tiny, tiny.text("Once upon a time"), max_new_tokens=LENGTH)
    made = tiny_server.client.completions.create(model="tiny", prompt="Once upon a time", max_tokens=LENGTH)
    assert made.choices[0].text == tiny.tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd")


def test_requests_that_sample_and_requests_that_do_not_run_side_by_side(
    tiny_server: Running, expected: list[str]
) -> None:
    """With top_p next to nothing, sampling can only take the likeliest token."""

    async def both() -> tuple[list[str], list[str], list[str]]:
        async def ask(**settings: Any) -> list[str]:
            return await asyncio.to_thread(ask_all, tiny_server.url, [("tiny", n) for n in range(8)], **settings)

        return await asyncio.gather(ask(), ask(temperature=1.0, top_p=1e-6), ask(temperature=2.0))

    likeliest, narrow, wild = asyncio.run(both())
    assert likeliest == narrow == expected[:8]
    assert wild != likeliest


def test_more_requests_than_the_cache_holds_wait_their_turn(tiny: Usable, expected: list[str]) -> None:
    engine = BatchedEngine(tiny, limit=128, cache_bytes=0)
    try:
        assert answers(engine, tiny, range(10)) == expected[:10]
        assert disagreement(engine, tiny) is None
    finally:
        engine.stop()
    assert engine.fault is not None, "a stopped engine does not pass for a running one"


def answers(engine: Engine, usable: Usable, numbers: range) -> list[str]:
    async def one(number: int) -> str:
        ask = Ask(usable.conversation(asked(number)), LENGTH)
        tokens = [token async for token in engine.answer(ask)]
        return str(usable.tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd")

    async def together() -> list[str]:
        return list(await asyncio.gather(*[one(number) for number in numbers]))

    return asyncio.run(together())


def test_an_engine_that_answers_otherwise_than_its_model_is_found_out(
    tiny: Usable, make_lora: Any, tmp_path: Path
) -> None:
    other = open_usable(make_lora(tmp_path / "other", amount=1.0))
    engine = BatchedEngine(other, limit=128, cache_bytes=0)
    try:
        assert "does not answer like the model" in str(disagreement(engine, tiny))
    finally:
        engine.stop()


def test_clients_that_leave_are_written_to_no_longer(open_service: Callable[..., Service], tiny_llama: Path) -> None:
    with running(open_service(tiny_llama, Limits(tokens=500, new_tokens=400))) as server:
        with server.client.chat.completions.create(model="tiny", messages=asked(1), stream=True) as parts:
            next(iter(parts))
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.2).chat.completions.create(model="tiny", messages=asked(1))
        while "peftkit_requests_in_flight 0.0" not in server.get("/metrics").text:
            pass
        lines = server.get("/metrics").text.splitlines()
        written = sum(float(line.split(" ")[1]) for line in lines if line.startswith("peftkit_answer_tokens_total{"))
        assert written < 800, "both answers would have had 400 tokens"


WRONG = {
    "an unknown model": ({"model": "tine"}, 404, "did you mean 'tiny'?"),
    "two answers": ({"n": 2}, 400, "n: is not supported"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools: is not supported"),
    "an unknown field": ({"temprature": 1}, 400, "temprature"),
    "a part that is no number": ({"max_tokens": "many"}, 400, "max_tokens"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a prompt too long": ({"messages": [{"role": "user", "content": "long " * 300}]}, 400, "may have 256"),
    "an answer too long": ({"max_tokens": 65}, 400, "65 tokens are asked for, and this answer may have 64"),
    "a seed that would be ignored": ({"seed": 1, "temperature": 1}, 400, "seed"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0"),
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_what_cannot_be_done_is_refused_with_the_reason(tiny_server: Running, fault: str) -> None:
    changed, status, told = WRONG[fault]
    answer = tiny_server.post("/v1/chat/completions", json={"model": "tiny", "messages": asked(1), **changed})
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_neutral_fields_that_clients_send_along_are_taken(tiny_server: Running) -> None:
    neutral = {"n": 1, "frequency_penalty": 0.0, "tools": [], "response_format": {"type": "text"}, "user": "me"}
    made = tiny_server.post("/v1/chat/completions", json={"messages": asked(1), "max_tokens": 2, **neutral})
    assert made.status_code == 200, made.text
    assert made.json()["model"] == "tiny"


def test_it_says_what_is_served_and_that_it_is_ready(tiny_server: Running) -> None:
    assert [model.id for model in tiny_server.client.models.list()] == ["tiny"]
    assert tiny_server.get("/health").json()["status"] == "ok"
    assert tiny_server.get("/ready").json()["status"] == "ready"
    assert tiny_server.get("/nowhere").json()["error"]["message"] == "there is no /nowhere"
    before = tiny_server.get("/metrics").text
    tiny_server.client.chat.completions.create(model="tiny", messages=asked(1), max_tokens=3)
    counts = [
        {line.split(" ")[0]: float(line.split(" ")[1]) for line in text.splitlines() if not line.startswith("#")}
        for text in (before, tiny_server.get("/metrics").text)
    ]
    grown = {name: value - counts[0].get(name, 0) for name, value in counts[1].items()}
    assert grown['peftkit_answer_tokens_total{model="tiny"}'] == 3
    assert grown['peftkit_requests_total{path="/v1/chat/completions",status="200"}'] == 1


def test_before_models_are_loaded_it_lives_and_is_not_ready() -> None:
    with running(Service(Limits())) as server:
        assert server.get("/health").status_code == 200
        assert (server.get("/ready").status_code, server.get("/ready").json()["status"]) == (503, "loading")
        assert server.post("/v1/chat/completions", json={"messages": asked(1)}).status_code == 503


def test_adapters_share_one_base_and_each_answers_by_its_name(
    open_service: Callable[..., Service], make_lora: Any, tiny_llama: Path, tmp_path: Path, expected: list[str]
) -> None:
    one = make_lora(tmp_path / "one", seed=1, amount=0.5)
    two = make_lora(tmp_path / "two", seed=2, amount=0.5, rank=8, target_modules=["o_proj", "gate_proj"])
    said = {"base": expected[:6], **{path.name: alone(open_usable(path), range(6)) for path in (one, two)}}
    assert len({answers[0] for answers in said.values()}) == 3, "the models must be told apart by their answers"
    service = open_service(tiny_llama, name="base", one=one, two=two)
    weights = [served.usable.backbone.model.get_input_embeddings().weight for served in service.models.values()]
    assert len({weight.data_ptr() for weight in weights}) == 1, "the base is in memory once"
    with running(service) as server:
        questions = [(name, number) for number in range(6) for name in said]
        assert ask_all(server.url, questions) == [said[name][number] for name, number in questions]


def test_virtual_tokens_are_served_one_request_at_a_time(make_peft: Any, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig

    for config in (
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ):
        usable = open_usable(make_peft(tmp_path / config.peft_type.value, config, amount=1.0))
        told: list[str] = []
        engine = open_engine(usable, limit=128, cache_bytes=0, say=told.append)
        assert isinstance(engine, SequentialEngine)
        assert told == ["one request at a time: its virtual tokens come before every input"]
        assert engine.limit == 128
        assert answers(engine, usable, range(4)) == alone(usable, range(4))
        engine.stop()

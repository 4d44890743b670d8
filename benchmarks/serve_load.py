"""`peftkit serve` under load: `python benchmarks/serve_load.py [RUN_OR_MODEL]`.

The same fifty prompts are asked one after another, by ten clients at a time and by fifty, streamed, through the real
openai client. What is asked alone tells what each client should get: an answer that is not its own but another's is
crossed, one that never comes is lost. In bfloat16 an answer may leave its own path at a near tie, and is then neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI, OpenAIError

from peftkit.environment import describe_environment
from peftkit.files import write_json
from peftkit.units import format_seconds

RESULTS = Path(__file__).parent / "results" / "serve-load"
PROMPTS = 50
CLIENTS = (1, 10, 50)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client got: its text, tokens and times in seconds; `text` is None where none came."""

    text: str | None
    tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", default="smollm2-135m")
    parser.add_argument("--max-tokens", type=int, default=24)
    options = parser.parse_args()
    command = [sys.executable, "-m", "peftkit.cli", "serve", options.reference, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = json.loads(server.stdout.readline())
        try:
            asyncio.run(ask(found, 4, 2, options.max_tokens))  # what is slow once: the first forward of each size
            rows, alone = [], list[Answer]()
            for clients in CLIENTS:
                started = time.perf_counter()
                answers = asyncio.run(ask(found, PROMPTS, clients, options.max_tokens))
                alone = alone or answers
                rows.append(row_of(clients, answers, alone, time.perf_counter() - started))
                print("  ".join(rows[-1].values()), flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
    engine = f"{found['engine']}, {found['dtype']} on {found['device']}"
    note = (
        f"{options.reference}, {engine}: {PROMPTS} prompts, answers of at most {options.max_tokens} tokens, streamed. "
        "Own: answers that are word for word what the same prompt got when it was asked alone."
    )
    document = {
        "note": note,
        "command": f"python benchmarks/serve_load.py {options.reference} --max-tokens {options.max_tokens}",
        "rows": rows,
        "environment": json.loads(json.dumps(describe_environment())),
    }
    write_json(RESULTS / f"{Path(options.reference).name}.json", document)


async def ask(server: dict[str, Any], prompts: int, clients: int, max_tokens: int) -> list[Answer]:
    """The answers to the prompts, in order, so many asked at a time."""
    places = asyncio.Semaphore(clients)
    async with AsyncOpenAI(base_url=server["url"] + "/v1", api_key="any", max_retries=0, timeout=300) as client:

        async def one(number: int) -> Answer:
            async with places:
                return await stream(client, server["models"][0], number, max_tokens)

        return list(await asyncio.gather(*[one(number) for number in range(prompts)]))


async def stream(client: AsyncOpenAI, model: str, number: int, max_tokens: int) -> Answer:
    """One answer and its times."""
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    messages: Any = [{"role": "user", "content": f"Write one sentence about the number {number}."}]
    settings: Any = {"max_tokens": max_tokens, "temperature": 0, "stream_options": {"include_usage": True}}
    try:
        parts = await client.chat.completions.create(model=model, messages=messages, stream=True, **settings)
        async for part in parts:
            if part.usage is not None:
                tokens = part.usage.completion_tokens
            piece = part.choices[0].delta.content if part.choices else None
            if piece:
                first = first or time.perf_counter() - started
                text += piece
    except OpenAIError:
        return Answer(None)
    return Answer(text, tokens, first, time.perf_counter() - started)


def row_of(clients: int, answers: list[Answer], alone: list[Answer], wall_seconds: float) -> dict[str, str]:
    """A line of the table."""
    whole = [answer for answer in answers if answer.text is not None]
    own = [answer.text == known.text for answer, known in zip(answers, alone, strict=True)]
    texts = {known.text for known in alone}
    crossed = sum(not mine and answer.text in texts for mine, answer in zip(own, answers, strict=True))
    first = np.percentile([answer.first_seconds for answer in whole], (50, 99))
    times = np.percentile([answer.seconds for answer in whole], (50, 90, 99))
    return {
        "clients": str(clients),
        "tokens/s": f"{sum(answer.tokens for answer in whole) / wall_seconds:.1f}",
        "first token p50": format_seconds(float(first[0])),
        "p99": format_seconds(float(first[1])),
        "answer p50": format_seconds(float(times[0])),
        "answer p90": format_seconds(float(times[1])),
        "answer p99": format_seconds(float(times[2])),
        "own": f"{sum(own)}/{len(answers)}",
        "lost": str(len(answers) - len(whole)),
        "crossed": str(crossed),
    }


if __name__ == "__main__":
    main()

"""What turns prompts into tokens: transformers' continuous batching, or its `generate`, one request after another."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, StoppingCriteriaList, set_seed

from peftkit.deploy.generate import write_answer
from peftkit.deploy.usable import Usable
from peftkit.errors import PeftkitError

PAGE_TOKENS = {"cpu": 32, "cuda": 256}
"""Tokens whose keys and values lie together: few waste little, and CUDA's kernels want many."""
STEP_TOKENS = {"cpu": 256, "cuda": 2048}
"""Most tokens of one forward: prompts longer than that are read in pieces, between the steps of other answers."""
MOST_TOGETHER = 256
"""Requests that one step writes a token of."""
CACHE_SHARE = 0.25
"""Of the memory that is free, what keys and values may take, over all models."""
PROBED_TOKENS = 4
PATIENCE_SECONDS = 2.0
"""How often a waiting request looks whether the engine is still alive."""


class EngineFault(PeftkitError):
    """The engine failed while it answered."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for tokens. `temperature` 0 takes the likeliest each time."""

    tokens: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class Engine(Protocol):
    """Answers many requests at a time, all from one event loop."""

    name: str
    limit: int
    """Tokens of the longest prompt together with its answer."""
    seeds: bool
    """Whether a request's seed is heeded."""

    @property
    def fault(self) -> str | None:
        """Why it answers no more; None while it does."""
        ...

    def answer(self, ask: Ask) -> AsyncGenerator[int, None]:
        """The tokens of the answer as they come; leaving it early ends the work on it.

        Raises:
            EngineFault: it failed.
        """
        ...

    def stop(self) -> None:
        """Finish what runs, and let go of the model."""
        ...


class Room:
    """So many pages of the cache, lent in the order of asking, so that no answer is begun that cannot be finished."""

    def __init__(self, pages: int) -> None:
        self._free = pages
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def lent(self, pages: int) -> AsyncIterator[None]:
        """Wait for that many pages, and give them back."""
        async with self._turn:
            while self._free < pages:
                self._freed.clear()
                await self._freed.wait()
            self._free -= pages
        try:
            yield
        finally:
            self._free += pages
            self._freed.set()


class BatchedEngine:
    """Transformers' continuous batching: requests join and leave between steps, keys and values lie in pages.

    It samples for all requests of a manager or for none, so there is one manager for likeliest tokens and, from the
    first request that samples on, another. Both read the same weights.
    """

    name = "transformers continuous batching"
    seeds = False

    def __init__(self, usable: Usable, *, limit: int, cache_bytes: int) -> None:
        """
        Args:
            cache_bytes: of keys and values, for both managers together; one request of `limit` tokens always fits.
        """
        self.limit = limit
        self._model, self._stops = usable.backbone.model, usable.stops()
        kind = "cpu" if self._model.device.type == "cpu" else "cuda"
        self._page, self._step = PAGE_TOKENS[kind], STEP_TOKENS[kind]
        page_bytes = self._page * (token_bytes(usable) + self._mask_bytes(usable))
        wanted = MOST_TOGETHER * self._pages_of(limit)
        self._pages = max(self._pages_of(limit), min(wanted, cache_bytes // 2 // page_bytes))
        self._numbers = itertools.count()
        self._managers: dict[bool, Any] = {}
        self._rooms: dict[bool, Room] = {}
        self._manager(False)

    @property
    def fault(self) -> str | None:
        dead = [manager for manager in self._managers.values() if not manager.is_running()]
        return f"its loop ended: {dead[0].background_thread_status.fatal_error}" if dead else None

    async def answer(self, ask: Ask) -> AsyncGenerator[int, None]:
        sampled = ask.temperature > 0
        manager = self._manager(sampled)
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        settings = {"temperature": float(ask.temperature), "top_p": float(ask.top_p)} if sampled else {}
        async with self._rooms[sampled].lent(self._pages_of(len(ask.tokens) + ask.max_new_tokens)):
            name, given = f"request-{next(self._numbers)}", 0
            manager.register_result_handler(name, outputs.put_nowait)
            taken = manager.add_request(
                ask.tokens, request_id=name, max_new_tokens=ask.max_new_tokens, streaming=True, **settings
            )
            finished = taken is None
            try:
                while not finished:
                    output = await self._next(outputs)
                    finished = output.is_finished()
                    if output.error is not None:
                        raise EngineFault(f"the engine could not answer: {output.error}")
                    for token in output.generated_tokens[given:]:
                        yield token
                    given = len(output.generated_tokens)
                if taken is None:
                    raise EngineFault("the engine takes no more requests: " + (self.fault or "it is stopping"))
            finally:
                if not finished:
                    manager.cancel_request(name)
                    manager.output_router.result_handlers.pop(name, None)
                    while manager.get_result(timeout=0) is not None:  # written for those who had gone
                        continue

    def stop(self) -> None:
        for manager in self._managers.values():
            manager.stop(block=True)
            manager.destroy()

    async def _next(self, outputs: asyncio.Queue[Any]) -> Any:
        """The next output, or the end where the loop died without a word."""
        while True:
            try:
                return await asyncio.wait_for(outputs.get(), PATIENCE_SECONDS)
            except TimeoutError:
                if self.fault is not None and outputs.empty():
                    raise EngineFault(f"the engine could not answer: {self.fault}") from None

    def _pages_of(self, tokens: int) -> int:
        return math.ceil(tokens / self._page) + 1

    def _manager(self, sampled: bool) -> Any:
        if sampled not in self._managers:
            self._rooms[sampled] = Room(self._pages)
            manager = self._model.init_continuous_batching(
                generation_config=self._generation(sampled), continuous_batching_config=self._batching()
            )
            manager.start()
            self._managers[sampled] = manager
        return self._managers[sampled]

    def _generation(self, sampled: bool) -> GenerationConfig:
        """Of a manager; temperature and top_p stand for what each request brings, and must not be neutral."""
        ends = self._stops or [-1]
        if not sampled:
            return GenerationConfig(do_sample=False, eos_token_id=ends, max_new_tokens=1)
        return GenerationConfig(
            do_sample=True, temperature=0.5, top_p=0.5, top_k=0, eos_token_id=ends, max_new_tokens=1
        )

    def _mask_bytes(self, usable: Usable) -> int:
        """Of one token in the mask between a step's tokens and all that lie in the cache."""
        return self._step * int(usable.backbone.compute_dtype.itemsize)

    def _batching(self) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(
            page_size=self._page,
            num_blocks=self._pages + 1,
            max_batch_tokens=self._step,
            max_requests_per_batch=MOST_TOGETHER,
            per_request_processors=True,
            auto_switch_to_flash=self._model.device.type == "cuda",
        )


class SequentialEngine:
    """Transformers' `generate`, one request after another, for what cannot be batched: prefix and prompt tuning."""

    name = "transformers generate, one request at a time"
    seeds = True
    fault: str | None = None

    def __init__(self, usable: Usable, *, limit: int) -> None:
        self.limit = limit
        self._usable = usable
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generate")

    async def answer(self, ask: Ask) -> AsyncGenerator[int, None]:
        loop, outputs = asyncio.get_running_loop(), asyncio.Queue[int | Future[Any]]()
        left = threading.Event()

        def tell(item: int | Future[Any]) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, item)

        done = self._worker.submit(self._generate, ask, _Teller(tell), left)
        done.add_done_callback(tell)
        try:
            while isinstance(item := await outputs.get(), int):
                yield item
            fault = item.exception()
            if fault is not None:
                raise EngineFault(f"the engine could not answer: {fault}") from fault
        finally:
            left.set()

    def stop(self) -> None:
        self._worker.shutdown(wait=True)

    def _generate(self, ask: Ask, teller: _Teller, left: threading.Event) -> None:
        if left.is_set():
            return
        if ask.seed is not None:
            set_seed(ask.seed)
        write_answer(
            self._usable,
            ask.tokens,
            max_new_tokens=ask.max_new_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            streamer=teller,
            stopping=StoppingCriteriaList([_Left(left)]),
        )


class _Teller:
    """A streamer of transformers: passes each new token on; the first call brings the prompt."""

    def __init__(self, tell: Any) -> None:
        self._tell, self._prompt = tell, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            for token in value.reshape(-1).tolist():
                self._tell(int(token))
        self._prompt = False

    def end(self) -> None:
        """Nothing is left: tokens are passed on as they come."""


class _Left:
    """A stopping criterion of transformers: ends the answer to somebody who has gone."""

    def __init__(self, left: threading.Event) -> None:
        self._left = left

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._left.is_set(), device=input_ids.device, dtype=torch.bool)


def open_engine(usable: Usable, *, limit: int, cache_bytes: int, say: Callable[[str], None]) -> Engine:
    """The batched engine where it answers like the model itself, else the other; `say` is told why."""
    reason = "its virtual tokens come before every input" if usable.virtual_tokens else None
    if reason is None:
        try:
            engine = BatchedEngine(usable, limit=limit, cache_bytes=cache_bytes)
        except (AttributeError, ValueError, NotImplementedError) as fault:
            reason = str(fault)
        else:
            reason = disagreement(engine, usable)
            if reason is None:
                return engine
            engine.stop()
    say(f"one request at a time: {reason}")
    return SequentialEngine(usable, limit=limit)


def disagreement(engine: Engine, usable: Usable) -> str | None:
    """What is wrong with the engine's likeliest tokens, held against logits of the model itself; None for nothing."""

    async def ask() -> list[int]:
        return [token async for token in engine.answer(Ask(prompt, PROBED_TOKENS))]

    prompt = usable.asked("Hello!")
    try:
        answer = asyncio.run(ask())
    except EngineFault as fault:
        return str(fault)
    with torch.inference_mode():
        ids = torch.tensor([prompt + answer], device=usable.backbone.model.device)
        logits_TV = usable.backbone.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    taken_T = logits_TV.gather(1, ids[0, len(prompt) :, None])[:, 0]
    lost = (logits_TV.amax(1) - taken_T) / (logits_TV.amax(1) - logits_TV.amin(1))
    # rounding reorders near ties: a few steps of the dtype, of the logits' whole range
    allowed = 8 * torch.finfo(usable.backbone.compute_dtype).eps
    return None if bool((lost <= allowed).all()) else "batched, it does not answer like the model itself"


def token_bytes(usable: Usable) -> int:
    """Bytes of one token's keys and values."""
    dims = usable.backbone.dims
    return 2 * dims.layers * dims.kv_heads * dims.head_dim * int(usable.backbone.compute_dtype.itemsize)

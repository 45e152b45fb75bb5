from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kaito_flows.containers.server.engine import Engine
from kaito_flows.containers.server.metrics import ServerMetrics
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.worker import LINGER_SECONDS, Answer, Order, Worker

from .conftest import PRESET


@pytest.fixture(scope="module")
def engine(weights: Path) -> Engine:
    return Engine.load(weights, name=PRESET, torch_dtype="float32")


def order(engine: Engine, tokens: int) -> Order:
    return Order(PRESET, (65, 66), engine.configure({}, max_new_tokens=tokens))


def test_answers_come_in_the_order_of_the_line(engine: Engine) -> None:
    async def ask() -> list[int]:
        worker = Worker(engine, ServerMetrics())
        ended: list[int] = []

        async def one(tokens: int) -> None:
            answer = await worker.submit(order(engine, tokens)).answer()
            ended.append(answer.completion_tokens)

        await asyncio.gather(one(60), one(3), one(20))
        await worker.stop(1)
        return ended

    assert asyncio.run(ask()) == [60, 3, 20]


def test_a_full_line_is_refused_and_goes_on(engine: Engine) -> None:
    async def ask() -> None:
        worker = Worker(engine, ServerMetrics(), max_waiting=1)
        running, waiting = worker.submit(order(engine, 100)), worker.submit(order(engine, 1))
        with pytest.raises(Refusal) as caught:
            worker.submit(order(engine, 1))
        assert (caught.value.status, caught.value.code) == (429, "server_busy")
        assert (await running.answer()).completion_tokens == 100
        assert (await waiting.answer()).completion_tokens == 1
        assert (await worker.submit(order(engine, 2)).answer()).completion_tokens == 2
        await worker.stop(1)

    asyncio.run(ask())


def test_stopping_answers_all_who_are_in_the_line_and_then_refuses(engine: Engine) -> None:
    async def ask() -> tuple[list[Answer], Refusal]:
        worker = Worker(engine, ServerMetrics())
        running, waiting = worker.submit(order(engine, 200)), worker.submit(order(engine, 30))
        await anext(running.items())
        stop = asyncio.create_task(worker.stop(30))
        await asyncio.sleep(0)
        late = worker.submit(order(engine, 2))
        answers = [await generation.answer() for generation in (running, waiting, late)]
        await stop
        with pytest.raises(Refusal) as refused:
            worker.submit(order(engine, 1))
        return answers, refused.value

    start = time.monotonic()
    answers, refused = asyncio.run(ask())
    assert [(answer.completion_tokens, answer.finish_reason) for answer in answers] == [
        (200, "length"), (30, "length"), (2, "length"),
    ]  # fmt: skip
    assert (refused.status, refused.code) == (503, "shutting_down")
    assert time.monotonic() - start < 20


def test_stopping_waits_a_moment_for_those_who_are_connected_and_may_ask_again(engine: Engine) -> None:
    async def ask() -> Answer:
        worker = Worker(engine, ServerMetrics())
        stop = asyncio.create_task(worker.stop(30, connected=lambda: True))
        await asyncio.sleep(LINGER_SECONDS / 2)
        answer = await worker.submit(order(engine, 2)).answer()
        await stop
        return answer

    start = time.monotonic()
    assert asyncio.run(ask()).finish_reason == "length"
    assert time.monotonic() - start < 10


def test_stopping_cuts_all_who_are_left_when_the_grace_is_over(engine: Engine) -> None:
    async def ask() -> list[Refusal]:
        worker = Worker(engine, ServerMetrics())
        running, waiting = worker.submit(order(engine, 4000)), worker.submit(order(engine, 1))
        await anext(running.items())
        await worker.stop(0.2)
        refusals = []
        for generation in (running, waiting):
            with pytest.raises(Refusal) as caught:
                await generation.answer()
            refusals.append(caught.value)
        return refusals

    start = time.monotonic()
    assert [refusal.code for refusal in asyncio.run(ask())] == ["shutting_down"] * 2
    assert time.monotonic() - start < 5

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from kaito_flows.containers.server.engine import Engine
from kaito_flows.containers.server.metrics import ServerMetrics
from kaito_flows.containers.server.refusal import Refusal
from kaito_flows.containers.server.worker import Answer, Order, Worker

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


def test_stopping_lets_the_running_answer_end_and_refuses_the_rest(engine: Engine) -> None:
    async def ask() -> tuple[Answer, Refusal, Refusal]:
        worker = Worker(engine, ServerMetrics())
        running, waiting = worker.submit(order(engine, 200)), worker.submit(order(engine, 200))
        await anext(running.items())
        stop = asyncio.create_task(worker.stop(30))
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as late:
            worker.submit(order(engine, 1))
        answer = await running.answer()
        with pytest.raises(Refusal) as refused:
            await waiting.answer()
        await stop
        return answer, late.value, refused.value

    answer, late, refused = asyncio.run(ask())
    assert (answer.completion_tokens, answer.finish_reason) == (200, "length")
    assert (late.status, refused.status) == (503, 503)
    assert refused.code == "shutting_down"


def test_stopping_cuts_the_running_answer_when_the_grace_is_over(engine: Engine) -> None:
    async def ask() -> Refusal:
        worker = Worker(engine, ServerMetrics())
        running = worker.submit(order(engine, 4000))
        await anext(running.items())
        await worker.stop(0.2)
        with pytest.raises(Refusal) as caught:
            await running.answer()
        return caught.value

    start = time.monotonic()
    assert asyncio.run(ask()).code == "shutting_down"
    assert time.monotonic() - start < 5

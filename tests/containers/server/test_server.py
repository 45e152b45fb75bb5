"""The real server, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kaito_flows.containers.server.gate import MAX_BODY_BYTES

from .conftest import CONTEXT, MODEL_ID, PRESET, Served

QUESTION = [{"role": "user", "content": "What is a test?"}]
GREEDY = {"do_sample": False, "max_new_tokens": 24}
LONG = 3500  # tokens: seconds of work for the tiny model


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A chat completion, greedy and short unless the body says otherwise."""
    response = client.post(
        "/v1/chat/completions", json={"messages": QUESTION, "temperature": 0, "max_tokens": 24, **body}
    )
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def events(lines: Iterator[str]) -> Iterator[dict[str, Any] | str]:
    """What a stream of server-sent events carries."""
    for line in lines:
        if line:
            assert line.startswith("data: ")
            yield "[DONE]" if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def stream(client: httpx.Client, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
    """All chunks of a streamed answer; it must end with [DONE]."""
    with client.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response.iter_lines())
    assert last == "[DONE]"
    return [chunk for chunk in chunks if isinstance(chunk, dict)]


def metric(client: httpx.Client, line: str) -> float:
    """One value of /metrics, by its name and labels."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def wait_until_idle(client: httpx.Client, seconds: float = 5.0) -> float:
    """How long until a short request is answered."""
    start = time.monotonic()
    complete(client, max_tokens=1)
    taken = time.monotonic() - start
    assert taken < seconds
    return taken


# --- probes, models, metrics


def test_it_says_that_it_runs_and_that_it_is_healthy(client: httpx.Client) -> None:
    assert client.get("/").json() == {"message": "Server is running"}
    response = client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "Healthy"})


def test_the_serving_event_names_the_address_and_the_models(served: Served) -> None:
    assert served.serving["models"] == [PRESET, "glosses", "verses.v2"]
    assert served.serving["host"] == "127.0.0.1"
    stages = [event["name"] for event in served.running.events if event["event"] == "stage"]
    assert stages == ["check inputs", "unpack adapters", "load model", "load adapters"]


def test_the_base_and_each_adapter_are_listed(client: httpx.Client, images: dict[str, str]) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [(m["id"], m["parent"], m["root"]) for m in models] == [
        (PRESET, None, MODEL_ID),
        *((name, PRESET, image) for name, image in images.items()),
    ]
    assert {m["max_model_len"] for m in models} == {CONTEXT}
    assert client.get("/v1/models/verses.v2").json() == models[2]
    assert client.get("/v1/models/none").status_code == 404


def test_metrics_count_requests_and_tokens_by_model(client: httpx.Client) -> None:
    route = '{model="glosses",route="/v1/chat/completions",status="200"}'
    names = [
        f"kaito_flows_server_requests_total{route}",
        'kaito_flows_server_generated_tokens_total{model="glosses"}',
        'kaito_flows_server_prompt_tokens_total{model="glosses"}',
        'kaito_flows_server_request_seconds_count{model="glosses",route="/v1/chat/completions"}',
        'kaito_flows_server_time_to_first_text_seconds_count{model="glosses"}',
    ]
    before = [metric(client, name) for name in names]
    usage = complete(client, model="glosses")["usage"]
    deadline = time.monotonic() + 5
    while (after := [metric(client, name) for name in names])[0] == before[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown == [1, usage["completion_tokens"], usage["prompt_tokens"], 1, 1]
    assert metric(client, "kaito_flows_server_up") == 1
    assert metric(client, "kaito_flows_server_model_load_seconds") > 0
    assert metric(client, "kaito_flows_server_requests_in_flight") == 1  # this very one


def test_metrics_have_no_series_for_what_a_stranger_makes_up(client: httpx.Client) -> None:
    client.get("/never/heard/of")
    client.post("/v1/chat/completions", json={"model": "made-up", "messages": QUESTION})
    text = client.get("/metrics").text
    assert "never" not in text
    assert "made-up" not in text


# --- KAITO's /chat


def test_messages_are_answered_through_the_chat_template_as_with_peft_alone(
    client: httpx.Client, served: Served
) -> None:
    weights = served.root / "workspace" / "weights"
    tokenizer = AutoTokenizer.from_pretrained(weights)
    base = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, served.root / "mnt" / "adapter" / "glosses")
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = model.generate(**prompt, do_sample=False, max_new_tokens=24, pad_token_id=256)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    response = client.post("/chat", json={"messages": QUESTION, "generate_kwargs": GREEDY})
    assert response.status_code == 200
    assert response.json() == {"Result": expected}
    assert text_of(complete(client, model="glosses")) == expected


def test_a_prompt_comes_back_with_its_continuation_or_without(client: httpx.Client) -> None:
    body = {"prompt": "Once upon", "generate_kwargs": GREEDY}
    full = client.post("/chat", json=body).json()["Result"]
    bare = client.post("/chat", json={**body, "return_full_text": False}).json()["Result"]
    assert bare
    assert full == "Once upon" + bare
    # The raw prompt, no chat template: /v1/completions says the same.
    raw = client.post(
        "/v1/completions", json={"model": "glosses", "prompt": "Once upon", "temperature": 0, "max_tokens": 24}
    ).json()
    assert raw["choices"][0]["text"] == bare
    assert raw["object"] == "text_completion"


def test_the_first_adapter_answers_unless_the_request_names_a_model(client: httpx.Client) -> None:
    def chat(**more: Any) -> str:
        response = client.post("/chat", json={"messages": QUESTION, "generate_kwargs": GREEDY, **more})
        result: str = response.json()["Result"]
        return result

    answers = {name: chat(model=name) for name in (PRESET, "glosses", "verses.v2")}
    assert len(set(answers.values())) == 3
    assert chat() == answers["glosses"]
    assert client.post("/chat", json={"prompt": "a", "model": "nobody"}).status_code == 404


def test_max_length_counts_the_prompt_and_is_200_by_default(client: httpx.Client) -> None:
    def chat(prompt: str, **kwargs: Any) -> httpx.Response:
        body = {"prompt": prompt, "return_full_text": False, "generate_kwargs": kwargs, "model": PRESET}
        return client.post("/chat", json=body)

    before = metric(client, f'kaito_flows_server_generated_tokens_total{{model="{PRESET}"}}')
    assert chat("a" * 190).status_code == 200
    assert metric(client, f'kaito_flows_server_generated_tokens_total{{model="{PRESET}"}}') == before + 10
    refused = chat("a" * 250)
    assert refused.status_code == 400
    assert "250 tokens" in refused.json()["detail"]
    assert chat("a" * 250, max_length=252).status_code == 200
    assert chat("a" * 250, max_new_tokens=2).status_code == 200
    assert chat("a" * CONTEXT).status_code == 400


def test_a_prompt_that_is_too_long_can_be_cut_at_its_beginning(client: httpx.Client) -> None:
    body = {"return_full_text": False, "generate_kwargs": GREEDY, "handle_long_generation": "hole"}
    kept = "b" * (CONTEXT - GREEDY["max_new_tokens"])
    long = client.post("/chat", json={**body, "prompt": "a" * 50 + kept})
    assert long.status_code == 200
    assert long.json() == client.post("/chat", json={**body, "prompt": kept}).json()


def test_a_prefix_goes_before_the_prompt_but_is_not_returned(client: httpx.Client) -> None:
    body = {"generate_kwargs": GREEDY}
    prefixed = client.post("/chat", json={**body, "prompt": "upon", "prefix": "Once "}).json()["Result"]
    whole = client.post("/chat", json={**body, "prompt": "Once upon"}).json()["Result"]
    assert whole == "Once " + prefixed


def test_other_generate_options_work_if_transformers_knows_them(client: httpx.Client) -> None:
    def chat(**kwargs: Any) -> httpx.Response:
        return client.post("/chat", json={"messages": QUESTION, "generate_kwargs": {**GREEDY, **kwargs}})

    plain = chat().json()["Result"]
    ended = chat(eos_token_id=ord(plain[3]) if plain[3].isascii() else 0)
    assert ended.status_code == 200
    assert chat(no_repeat_ngram_size=2).json()["Result"] != plain
    assert chat(stop_strings=[plain[5:7]]).json()["Result"] == plain[: plain.index(plain[5:7])]
    assert chat(num_beams=2).status_code == 200
    for name, value in {"frobnicate": 1, "num_return_sequences": 2, "compile_config": {}}.items():
        refused = chat(**{name: value})
        assert refused.status_code == 400
        assert name in refused.json()["detail"]
    assert chat(bad_words_ids="x").status_code == 400
    assert chat(exponential_decay_length_penalty="x").status_code == 400
    wait_until_idle(client)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "Text generation parameter prompt required"),
        ({"prompt": ""}, "Text generation parameter prompt required"),
        ({"messages": []}, "Conversational parameter messages required"),
    ],
)
def test_what_is_missing_is_said_in_kaitos_words(client: httpx.Client, body: dict[str, Any], detail: str) -> None:
    response = client.post("/chat", json=body)
    assert (response.status_code, response.json()) == (400, {"detail": detail})


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": 5},
        {"prompt": "a", "generate_kwargs": {"temperature": "hot"}},
        {"prompt": "a", "generate_kwargs": {"num_beams": 1000}},
        {"prompt": "a", "generate_kwargs": {"max_length": 0}},
        {"prompt": "a", "handle_long_generation": "magic"},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        [1, 2],
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_the_place(client: httpx.Client, body: Any) -> None:
    response = client.post("/chat", json=body)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"][0] == "body"
    assert response.json()["detail"][0]["msg"]


def test_what_is_no_json_is_refused(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/chat", content=b"{prompt: ", headers=headers).status_code == 422
    response = client.post("/v1/chat/completions", content=b"{", headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")
    assert client.post("/chat", content=b'{"prompt": "\xff"}', headers=headers).status_code in (400, 422)
    for key in ("prompt", "model", "generate_kwargs"):
        value = b'{"\\ud800": 1}' if key == "generate_kwargs" else b'"\\ud800"'
        body = b'{"prompt": "a", "' + key.encode() + b'": ' + value + b"}"
        assert client.post("/chat", content=body, headers=headers).status_code in (400, 422)
    assert client.post("/v1/completions", content=b'{"\\ud800": 1}', headers=headers).status_code == 400
    assert client.get("/chat").status_code == 405


# --- OpenAI's API


def test_a_chat_completion_has_openais_form(client: httpx.Client) -> None:
    answer = complete(client)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "glosses"
    assert answer["id"].startswith("chatcmpl-")
    assert abs(answer["created"] - time.time()) < 60
    [choice] = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "length", "assistant")
    usage = answer["usage"]
    assert usage["completion_tokens"] == 24
    assert usage["prompt_tokens"] == len("x\nWhat is a test?x\nx\n")  # one token a byte or special token
    assert usage["total_tokens"] == usage["prompt_tokens"] + 24


def test_greedy_answers_are_the_same_every_time(client: httpx.Client) -> None:
    assert len({text_of(complete(client, model=PRESET)) for _ in range(3)}) == 1


def test_sampling_repeats_with_a_seed(client: httpx.Client) -> None:
    def sample(seed: int | None) -> str:
        return text_of(complete(client, temperature=3, top_p=0.99, seed=seed))

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)
    assert sample(None) != sample(None)


def test_a_stop_string_ends_the_answer(client: httpx.Client) -> None:
    whole = text_of(complete(client))
    stop = whole[6:9]
    answer = complete(client, stop=stop)
    assert text_of(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert text_of(complete(client, stop=["never seen", stop])) == text_of(answer)


@pytest.mark.parametrize("more", [{}, {"stop": "e"}, {"temperature": 2, "seed": 3}, {"model": PRESET}])
def test_the_pieces_of_a_stream_joined_are_the_whole_answer(client: httpx.Client, more: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 60, **more}
    whole = complete(client, **body)
    chunks = stream(client, **body, stream_options={"include_usage": True})
    *pieces, usage = chunks
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text_of(whole)
    reasons = [piece["choices"][0]["finish_reason"] for piece in pieces]
    assert reasons == [None] * (len(pieces) - 1) + [whole["choices"][0]["finish_reason"]]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {piece["usage"] for piece in pieces} == {None}


def test_a_stream_comes_in_pieces_while_it_is_made(client: httpx.Client) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 400, "stream": True}
    arrived = []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for _ in events(response.iter_lines()):
            arrived.append(time.monotonic())
    assert len(arrived) > 100
    assert arrived[len(arrived) // 2] - arrived[0] > 0.2 * (arrived[-1] - arrived[0])


def test_a_completion_is_streamed_too_and_carries_no_usage_unasked(client: httpx.Client) -> None:
    body = {"prompt": "Once upon", "temperature": 0, "max_tokens": 30}
    whole = client.post("/v1/completions", json=body).json()
    chunks = stream(client, "/v1/completions", **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert all("usage" not in chunk for chunk in chunks)


def test_content_may_come_in_text_parts(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a test?"}]
    assert text_of(complete(client, messages=[{"role": "user", "content": parts}])) == text_of(complete(client))


def test_a_conversation_can_go_on_with_the_message_that_came_back(client: httpx.Client) -> None:
    message = complete(client, max_tokens=5)["choices"][0]["message"]
    more = [*QUESTION, {**message, "refusal": None, "tool_calls": None}, {"role": "user", "content": "And?"}]
    assert complete(client, messages=more)["usage"]["prompt_tokens"] > 40


def test_what_does_no_harm_is_taken(client: httpx.Client) -> None:
    answer = complete(
        client, user="u", n=1, stream=False, presence_penalty=0, logprobs=False, response_format={"type": "text"},
        tools=None, metadata={"a": "b"}, max_tokens=None, max_completion_tokens=24, top_k=-1,
    )  # fmt: skip
    assert text_of(answer) == text_of(complete(client))


@pytest.mark.parametrize(
    ("more", "param", "code"),
    [
        ({"n": 2}, "n", "invalid_value"),
        ({"tools": [{}]}, "tools", "invalid_value"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "invalid_value"),
        ({"frequency_penalty": 1}, "frequency_penalty", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "a" * CONTEXT}]}, "messages", "context_length_exceeded"),
        ({"stream": True, "max_tokens": CONTEXT}, "max_tokens", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: httpx.Client, more: dict[str, Any], param: str, code: str
) -> None:
    response = client.post("/v1/chat/completions", json={"messages": QUESTION, **more})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert error["message"]


def test_an_image_in_a_message_is_refused(client: httpx.Client) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 400


def test_an_unknown_model_is_a_404_in_openais_form(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={"model": "gpt-9", "messages": QUESTION})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "glosses" in error["message"]
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_body_that_is_too_large_is_refused_with_and_without_its_length(client: httpx.Client) -> None:
    large = json.dumps({"prompt": "a" * MAX_BODY_BYTES}).encode()
    headers = {"content-type": "application/json"}
    assert client.post("/chat", content=large, headers=headers).status_code == 413

    def chunks() -> Iterator[bytes]:
        for at in range(0, len(large), 1 << 16):
            yield large[at : at + (1 << 16)]

    assert client.post("/chat", content=chunks(), headers=headers).status_code == 413
    assert client.get("/health").status_code == 200


# --- several at once


def test_four_requests_at_once_all_get_their_own_answer(client: httpx.Client) -> None:
    asked = [(name, n) for name in (PRESET, "glosses", "verses.v2", PRESET) for n in (20, 40)]
    alone = [text_of(complete(client, model=name, max_tokens=n)) for name, n in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda ask: text_of(complete(client, model=ask[0], max_tokens=ask[1])), asked))
    assert together == alone


def test_health_answers_while_an_answer_is_made(client: httpx.Client) -> None:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": LONG, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(5):
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            assert time.monotonic() - start < 2
        assert metric(client, "kaito_flows_server_requests_in_flight") == 2
    wait_until_idle(client)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_frees_the_model(client: httpx.Client, served: Served, streaming: bool) -> None:
    body = json.dumps({"messages": QUESTION, "temperature": 0, "max_tokens": LONG, "stream": streaming}).encode()
    before = metric(client, 'kaito_flows_server_generated_tokens_total{model="glosses"}')
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((served.serving["host"], served.serving["port"])) as raw:
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 10
        while metric(client, "kaito_flows_server_requests_in_flight") < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5)
    wait_until_idle(client)
    made = metric(client, 'kaito_flows_server_generated_tokens_total{model="glosses"}') - before
    assert 1 < made < LONG / 2


def test_a_client_that_goes_away_from_the_line_is_never_worked_for(client: httpx.Client, served: Served) -> None:
    async def two() -> None:
        long = {"messages": QUESTION, "temperature": 0, "max_tokens": LONG, "model": PRESET}
        async with httpx.AsyncClient(base_url=served.url, timeout=60, trust_env=False) as asking:
            first = asyncio.create_task(asking.post("/v1/chat/completions", json=long))
            await asyncio.sleep(0.3)
            with pytest.raises(httpx.ReadTimeout):
                await asking.post("/v1/chat/completions", json={**long, "model": "verses.v2"}, timeout=0.3)
            first.cancel()
            await asyncio.wait({first})

    before = metric(client, 'kaito_flows_server_generated_tokens_total{model="verses.v2"}')
    asyncio.run(two())
    wait_until_idle(client)
    assert metric(client, 'kaito_flows_server_generated_tokens_total{model="verses.v2"}') == before


# --- what is written where


def test_standard_output_carries_only_events(served: Served, client: httpx.Client) -> None:
    complete(client)
    assert [event["event"] for event in served.running.events] == ["stage", "stage", "stage", "stage", "serving"]
    log = (served.root / "stderr.txt").read_text()
    assert "POST /v1/chat/completions glosses 200" in log
    assert "/health" not in log
    assert "What is a test" not in log

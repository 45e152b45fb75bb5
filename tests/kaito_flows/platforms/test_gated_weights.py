"""A base model behind a Secret: its tokenizer, which the run itself fetches, is asked for with the token in there."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest
from pod_fixtures import Place

from kaito_flows.errors import InputError, WeightsError
from kaito_flows.platforms import Weights
from kaito_flows.platforms.kubernetes import KubernetesPlatform
from kaito_flows.settings import Settings

pytestmark = pytest.mark.cluster

SOURCE = {"kind": "hub", "repo": "org/model", "revision": "main"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """What a Hub on this machine, which has one gated model, was shown as its visitors' tokens."""
    tokens: list[str | None] = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # The worker's own token is not the Workspace's.
    monkeypatch.setenv("HF_TOKEN", "of-the-worker")
    yield tokens
    server.shutdown()
    server.server_close()


def test_the_token_in_the_secret_is_shown_to_the_hub(place: Place, asked: list[str | None]) -> None:
    place.kubectl("create", "secret", "generic", "hub", "--from-literal=HF_TOKEN=of-the-workspace")
    platform = KubernetesPlatform(Settings(), cluster=place.cluster)
    platform.check_secrets([], hub="hub")
    with pytest.raises(WeightsError) as failure:
        platform.ensure_weights(Weights("gated", SOURCE, 1, "hub"), lambda event: None)
    assert failure.value.code == "weights-gated"
    assert set(asked) == {"Bearer of-the-workspace"}
    left = [path for path in Settings().folder.rglob("*") if path.is_file() and b"of-the-work" in path.read_bytes()]
    assert left == []


def test_a_secret_without_a_token_is_named(place: Place) -> None:
    place.kubectl("create", "secret", "generic", "hub", "--from-literal=TOKEN=x")
    with pytest.raises(InputError) as failure:
        KubernetesPlatform(Settings(), cluster=place.cluster).check_secrets([], hub="hub")
    assert failure.value.code == "invalid-secret" and "HF_TOKEN" in json.dumps(failure.value.as_dict())

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from kaito_flows.dataset import Patience, SourceFile, fetch, probe, public_url
from kaito_flows.dataset.urls import recorded_url
from kaito_flows.errors import DatasetError, DiskFullError

QUICK = Patience(attempts=4, backoff=0.01)
BODY = bytes(range(256)) * 20_000


def get(url: str, cache: Path, **options: Any) -> SourceFile:
    return fetch([url], cache, allow_files=False, patience=QUICK, **options)[0]


def refused(*urls: str, cache: Path, allow_files: bool = False) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        fetch(urls, cache, allow_files=allow_files, patience=QUICK)
    return caught.value


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.rglob("*") if path.suffix != ".lock"] if cache.is_dir() else []


def test_a_file_is_fetched_with_its_hash_and_size(site: Any, tmp_path: Path) -> None:
    file = get(site.add("/train.parquet", BODY), tmp_path)
    assert file.path.read_bytes() == BODY
    assert (file.sha256, file.bytes) == (hashlib.sha256(BODY).hexdigest(), len(BODY))


@pytest.mark.parametrize("validator", [{"etag": '"v1"'}, {"etag": None, "modified": "Tue, 24 Nov 2026 01:00:00 GMT"}])
def test_an_unchanged_file_is_not_sent_again(site: Any, tmp_path: Path, validator: dict[str, Any]) -> None:
    url = site.add("/a", BODY, **validator)
    first, again = get(url, tmp_path), get(url, tmp_path)
    assert first == again
    assert [(seen.status, seen.sent) for seen in site.seen] == [(200, len(BODY)), (304, 0)]


def test_a_changed_file_is_fetched_again(site: Any, tmp_path: Path) -> None:
    get(site.add("/a", b"old"), tmp_path)
    assert get(site.add("/a", b"new!"), tmp_path).path.read_bytes() == b"new!"


def test_a_cached_file_that_was_damaged_is_fetched_again(site: Any, tmp_path: Path) -> None:
    url = site.add("/a", b"whole")
    get(url, tmp_path).path.write_bytes(b"wh0le")
    assert get(url, tmp_path).path.read_bytes() == b"whole"


def test_a_damaged_sidecar_is_no_obstacle(site: Any, tmp_path: Path) -> None:
    url = site.add("/a", b"whole")
    file = get(url, tmp_path)
    for text in ("", "[]", "{}", "null", '{"url": 1}'):
        file.path.with_suffix(".json").write_text(text)
        assert get(url, tmp_path).path.read_bytes() == b"whole"


def test_a_cut_connection_is_resumed_where_it_broke(site: Any, tmp_path: Path, fault: Any) -> None:
    cuts = [fault(cut_after=3_000_000), fault(cut_after=1_500_000)]
    url = site.add("/a", BODY, etag='"v1"', faults=cuts)
    assert get(url, tmp_path).sha256 == hashlib.sha256(BODY).hexdigest()
    assert [seen.status for seen in site.seen] == [200, 206, 206]
    assert [seen.headers["If-Range"] for seen in site.seen] == [None, '"v1"', '"v1"']
    assert sum(seen.sent for seen in site.seen) < len(BODY) + 200_000


def test_a_connection_that_breaks_more_often_than_tries_are_allowed_gets_there(
    site: Any, tmp_path: Path, fault: Any
) -> None:
    cuts = [fault(cut_after=400_000) for _ in range(3 * QUICK.attempts)]
    assert get(site.add("/a", BODY, faults=cuts), tmp_path).path.read_bytes() == BODY


@pytest.mark.parametrize("page", [{"ranges": False}, {"etag": None}, {"etag": 'W/"v1"'}])
def test_without_ranges_or_a_strong_validator_a_cut_file_is_begun_anew(
    site: Any, tmp_path: Path, fault: Any, page: dict[str, Any]
) -> None:
    url = site.add("/a", BODY, faults=[fault(cut_after=2_000_000)], **page)
    assert get(url, tmp_path).sha256 == hashlib.sha256(BODY).hexdigest()
    assert [seen.status for seen in site.seen] == [200, 200]


def test_two_versions_of_a_file_are_never_joined(site: Any, tmp_path: Path, fault: Any) -> None:
    new = bytes(reversed(BODY))
    url = site.add("/a", BODY, faults=[fault(cut_after=2_000_000)])
    page = site.pages["/a"]

    def swap(url: str, done: int, total: int | None) -> None:
        page.body, page.etag = new, '"new"'

    assert get(url, tmp_path, on_progress=swap).path.read_bytes() == new


def test_a_server_that_always_cuts_at_the_same_place_is_given_up(site: Any, tmp_path: Path, fault: Any) -> None:
    url = site.add("/a", BODY, ranges=False, faults=[fault(cut_after=1000) for _ in range(50)])
    error = refused(url, cache=tmp_path)
    assert error.code == "dataset-unreachable"
    assert len(site.seen) == QUICK.attempts
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(site: Any, tmp_path: Path, fault: Any, status: int) -> None:
    url = site.add("/a", b"data", faults=[fault(status=status, body=b"<html>later"), fault(status=status)])
    assert get(url, tmp_path).path.read_bytes() == b"data"
    assert [seen.status for seen in site.seen] == [status, status, 200]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "dataset-refused"),
        (401, "dataset-forbidden"),
        (403, "dataset-forbidden"),
        (404, "dataset-not-found"),
        (410, "dataset-not-found"),
    ],
)
def test_what_will_not_pass_is_asked_for_once(site: Any, tmp_path: Path, fault: Any, status: int, code: str) -> None:
    url = site.add("/a", b"data", faults=[fault(status=status)])
    error = refused(url, cache=tmp_path)
    assert (error.code, error.place) == (code, url)
    assert len(site.seen) == 1
    assert left_over(tmp_path) == []


def test_retry_after_is_obeyed_in_seconds_and_as_a_date(site: Any, tmp_path: Path, fault: Any) -> None:
    soon = format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3), usegmt=True)
    waits = [fault(status=429, headers={"Retry-After": "1"}), fault(status=503, headers={"Retry-After": soon})]
    url = site.add("/a", b"data", faults=waits)
    begin = time.monotonic()
    get(url, tmp_path)
    assert 1.9 <= time.monotonic() - begin < 6


def test_a_server_that_asks_for_an_hour_is_not_waited_for(site: Any, tmp_path: Path, fault: Any) -> None:
    error = refused(
        site.add("/a", b"data", faults=[fault(status=429, headers={"Retry-After": "3600"})]), cache=tmp_path
    )
    assert error.code == "dataset-unreachable"
    assert "3600 s" in error.message


def test_nobody_listening_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = refused(f"http://127.0.0.1:{taken.getsockname()[1]}/a", cache=tmp_path)
    assert error.code == "dataset-unreachable"
    assert "tried 4 times" in error.message


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"\xef\xbb\xbf \n<!DOCTYPE html><title>Sign in</title>", "application/octet-stream"),
        (b"<HTML><body>", "text/plain"),
        (b"PAR1", "text/html; charset=utf-8"),
    ],
)
def test_a_web_page_is_not_taken_for_data(site: Any, tmp_path: Path, body: bytes, kind: str) -> None:
    url = site.add("/datasets/me/set/blob/main/a.parquet", body, content_type=kind)
    error = refused(url, cache=tmp_path)
    assert error.code == "dataset-is-html"
    assert "/resolve/" in error.hint
    assert "?download=true" in error.hint
    assert left_over(tmp_path) == []
    if kind == "text/html; charset=utf-8":
        with pytest.raises(DatasetError, match="web page"):
            probe([url], allow_files=False)


def test_an_empty_file_is_refused(site: Any, tmp_path: Path) -> None:
    url = site.add("/a", b"")
    assert refused(url, cache=tmp_path).code == "dataset-empty"
    with pytest.raises(DatasetError) as caught:
        probe([url], allow_files=False)
    assert caught.value.code == "dataset-empty"
    assert left_over(tmp_path) == []


def test_files_of_one_name_do_not_overwrite_each_other(site: Any, tmp_path: Path) -> None:
    urls = [site.add(f"/{part}/data.parquet?path=x/y/{part}", part.encode()) for part in ("one", "two", "three")]
    files = fetch(urls, tmp_path, allow_files=False)
    assert [file.path.read_bytes() for file in files] == [b"one", b"two", b"three"]


def test_a_file_named_twice_comes_once_over_the_wire(site: Any, tmp_path: Path) -> None:
    url = site.add("/a", BODY)
    assert len(set(fetch([url, url], tmp_path, allow_files=False))) == 1
    assert sum(seen.sent for seen in site.seen) == len(BODY)


def test_files_come_at_the_same_time(site: Any, tmp_path: Path, fault: Any) -> None:
    wait = {"Retry-After": "1"}
    urls = [site.add(f"/{n}", b"data", faults=[fault(status=503, headers=wait)]) for n in range(8)]
    begin = time.monotonic()
    fetch(urls, tmp_path, allow_files=False)
    assert time.monotonic() - begin < 4


def test_the_first_failure_ends_the_waiting_for_others(site: Any, tmp_path: Path, fault: Any) -> None:
    slow = site.add("/slow", b"data", faults=[fault(status=503, headers={"Retry-After": "60"})])
    begin = time.monotonic()
    assert refused(slow, site.url + "/gone", cache=tmp_path).code == "dataset-not-found"
    assert time.monotonic() - begin < 10


def _fetch_in_process(url: str, cache: str, results: Any) -> None:
    results.put(get(url, Path(cache)).sha256)


def test_two_processes_at_once_get_the_same_file_and_one_download(site: Any, tmp_path: Path) -> None:
    url = site.add("/a", BODY)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_fetch_in_process, args=(url, str(tmp_path), results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert {results.get(timeout=30) for _ in processes} == {hashlib.sha256(BODY).hexdigest()}
    for process in processes:
        process.join()
    assert sum(seen.sent for seen in site.seen) == len(BODY)


def test_a_killed_download_leaves_nothing_that_is_taken_for_the_file(site: Any, tmp_path: Path, fault: Any) -> None:
    url = site.add("/a", BODY, faults=[fault(cut_after=1_000_000), fault(status=503, headers={"Retry-After": "60"})])
    code = "import sys; from pathlib import Path; from kaito_flows.dataset import fetch; "
    code += "fetch([sys.argv[1]], Path(sys.argv[2]), allow_files=False)"
    process = subprocess.Popen([sys.executable, "-c", code, url, str(tmp_path)])
    while len(site.seen) < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("*.data"))
    assert get(url, tmp_path).path.read_bytes() == BODY
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".data", ".json", ".lock"]


def test_a_full_disk_is_named_and_leaves_nothing(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = site.add("/a", BODY)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError):
            get(url, tmp_path)
    assert left_over(tmp_path) == []
    assert get(url, tmp_path).bytes == len(BODY)


def test_redirects_are_followed_and_circles_are_refused(site: Any, tmp_path: Path, fault: Any) -> None:
    site.add("/data", b"data")
    url = site.add("/link", b"", faults=[fault(status=302, headers={"Location": "/data"})])
    assert get(url, tmp_path).path.read_bytes() == b"data"
    circle = site.add("/circle", b"", faults=[fault(status=302, headers={"Location": "/circle"}) for _ in range(30)])
    assert refused(circle, cache=tmp_path).code == "dataset-unreachable"


def test_progress_tells_of_every_file_to_its_end(site: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    url = site.add("/a?sig=secret", BODY)
    get(url, tmp_path, on_progress=lambda *facts: told.append(facts))
    assert told[-1] == (site.url + "/a?sig=…", len(BODY), len(BODY))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_local_file_is_used_where_it_lies_if_that_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "with space.parquet"
    file.write_bytes(b"data")
    cache = tmp_path / "cache"
    (found,) = fetch([file.as_uri()], cache, allow_files=True)
    assert (found.path, found.sha256) == (file, hashlib.sha256(b"data").hexdigest())
    assert probe([file.as_uri()], allow_files=True) == (4,)
    assert refused(file.as_uri(), cache=cache).code == "dataset-url"
    assert left_over(cache) == []


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///nowhere/a.parquet", "dataset-not-found"),
        ("file:///tmp", "dataset-not-found"),
        ("file:///dev/zero", "dataset-not-found"),
        ("file:a.parquet", "dataset-url"),
        ("file://host/a.parquet", "dataset-url"),
        ("ftp://example.com/a", "dataset-url"),
        ("/data/a.parquet", "dataset-url"),
        ("https://", "dataset-url"),
        ("http://[::1/a", "dataset-url"),
        ("", "dataset-url"),
    ],
)
def test_urls_that_cannot_be_fetched_are_named(url: str, code: str, tmp_path: Path) -> None:
    assert refused(url, cache=tmp_path, allow_files=True).code == code
    with pytest.raises(DatasetError):
        probe([url], allow_files=True)


def test_an_empty_or_html_local_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "page").write_text("<!doctype html>")
    assert refused((tmp_path / "empty").as_uri(), cache=tmp_path, allow_files=True).code == "dataset-empty"
    assert refused((tmp_path / "page").as_uri(), cache=tmp_path, allow_files=True).code == "dataset-is-html"


def test_probe_tells_sizes_without_fetching(site: Any) -> None:
    urls = [site.add("/head", BODY), site.add("/signed-for-get", BODY, head=False), site.add("/s", b"12", head=False)]
    site.pages["/s"].ranges = False
    assert probe(urls, allow_files=False) == (len(BODY), len(BODY), 2)
    assert sum(seen.sent for seen in site.seen if seen.method == "GET") < 2000


def test_probe_names_what_is_not_there_and_waits_for_what_is_busy(site: Any, fault: Any) -> None:
    with pytest.raises(DatasetError) as caught:
        probe([site.url + "/gone"], allow_files=False)
    assert caught.value.code == "dataset-not-found"
    busy = site.add("/busy", b"data", faults=[fault(status=503), fault(status=503)])
    assert probe([busy], allow_files=False, patience=QUICK) == (4,)


def test_no_secret_is_shown_stored_or_logged(site: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "httpx")
    host = site.url.removeprefix("http://")
    site.add("/a?sv=2024&sig=hunter2&download=true", b"data")
    file = get(f"http://me:hunter2@{host}/a?sv=2024&sig=hunter2&download=true", tmp_path)
    assert file.url == f"{site.url}/a?sv=…&sig=…&download=true"
    error = refused(f"http://me:hunter2@{host}/gone?token=hunter2#hunter2", cache=tmp_path)
    stored = "".join(path.name + path.read_text() for path in tmp_path.iterdir())
    assert "HTTP Request" in caplog.text
    assert "hunter2" not in f"{error} {json.dumps(error.as_dict())} {stored} {caplog.text}"


def test_credentials_in_the_url_are_sent(site: Any, tmp_path: Path) -> None:
    site.add("/a", b"data")
    get(site.url.replace("http://", "http://me:hunter2@") + "/a", tmp_path)
    assert site.seen[-1].headers["Authorization"] == "Basic bWU6aHVudGVyMg=="


def test_public_urls_keep_what_tells_files_apart() -> None:
    url = "https://u:p@example.com:8443/a/b.parquet?file=x/y.parquet&X-Amz-Signature=abc#frag"
    assert public_url(url) == "https://example.com:8443/a/b.parquet?file=x/y.parquet&X-Amz-Signature=…"
    assert recorded_url("file:///home/me/my%20data/train.parquet") == "file:train.parquet"

"""`nextoken serve`: what it hands to the service, and one service started and stopped as a person would."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

import pytest

from nextoken import TableModel

Run = Callable[..., Any]  # the fixture of conftest.py


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the service was called with; it stops at once, as if interrupted."""
    called: dict[str, Any] = {}

    def serve(model: Any, host: str, port: int, **options: Any) -> None:
        called.update(options, model=model, host=host, port=port)
        raise KeyboardInterrupt

    model = TableModel.random("ab")
    monkeypatch.setattr("nextoken.app._serve.load_quietly", lambda _: model)
    monkeypatch.setattr("nextoken.app.service.serve", serve)
    return called


def test_by_default_this_machine_only(run: Run, served: dict[str, Any]) -> None:
    finished = run("serve", "table")
    assert (finished.code, finished.out, finished.err) == (0, "", "")  # an interrupt is how a server is stopped
    assert (served["host"], served["port"], served["api_key"]) == ("127.0.0.1", 8000, None)
    assert isinstance(served["model"], TableModel)


def test_options_are_passed_on(run: Run, served: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run("serve", "table", "--port", "8080", "--name", "mine", "--api-key", "secret")
    assert (served["port"], served["name"], served["api_key"]) == (8080, "mine", "secret")
    monkeypatch.setenv("NEXTOKEN_API_KEY", "from the environment")
    run("serve", "table")
    assert served["api_key"] == "from the environment"


@pytest.mark.parametrize(
    ("host", "options", "warned"),
    [
        ("0.0.0.0", [], True),
        ("example.org", [], True),
        ("0.0.0.0", ["--api-key", "secret"], False),
        ("::1", [], False),
        ("localhost", [], False),
    ],
)
def test_an_open_door_is_pointed_out(
    host: str, options: list[str], warned: bool, run: Run, served: dict[str, Any]
) -> None:
    finished = run("serve", "table", "--host", host, *options)
    assert ("--api-key" in finished.err) == warned and served["host"] == host


def test_a_port_that_is_taken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextoken.app._serve.load_quietly", lambda _: TableModel.random("ab"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run("serve", "table", "--port", str(port)).refused(f"127.0.0.1:{port}")


@pytest.mark.slow
def test_a_service_starts_answers_and_stops() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = [sys.executable, "-m", "nextoken", "serve", "nano", "--port", str(port)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=10) as answer:
                    listed = json.load(answer)
                break
            except URLError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        assert [entry["id"] for entry in listed["data"]] == ["nano"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()

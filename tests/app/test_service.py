"""The HTTP service through a real server: its answers against the model itself, and against reading it locally."""

from __future__ import annotations

import itertools
import json
import math
import socket
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import nextoken
from nextoken.app.service import create_app, serve, serving
from nextoken.errors import ModelError, NextokenError
from nextoken.model.ngram import NgramModel
from nextoken.model.server import ServerModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.testing import check_language_model

TABLE = TableModel.random(["a", "b", "c", "d"], order=2, eos=True, zeros=0.2, seed=1)
BOS, EOS = 4, 5


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(TABLE, name="little", max_logprobs=6) as address:
        yield address


def ask(url: str, body: Any = None, *, key: str | None = None, path: str = "/v1/completions") -> tuple[int, Any]:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(url: str, **body: Any) -> list[dict[str, Any]]:
    status, answer = ask(url, body)
    assert status == 200, answer
    choices: list[dict[str, Any]] = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return choices


def test_what_it_serves(url: str) -> None:
    assert ask(url, path="/health") == (200, {"status": "ok"})
    status, listed = ask(url, path="/v1/models")
    (card,) = listed["data"]
    assert status == 200 and card["id"] == "little" and card["max_model_len"] is None
    assert card["meta"]["n_vocab"] == 6 and card["meta"]["digest"] == TABLE.digest


def test_greedy_takes_the_most_probable(url: str) -> None:
    (choice,) = complete(url, prompt="ab", temperature=0, max_tokens=5, return_token_ids=True)
    context = [0, 1]
    expected: list[int] = []
    while len(expected) < 5 and EOS not in expected:
        expected.append(int(TABLE.row([*context, *expected]).argmax()))
    assert choice["prompt_token_ids"] == [BOS, 0, 1]
    assert choice["token_ids"] == expected
    assert choice["text"] == TABLE.vocab.decode_text(expected)
    assert choice["finish_reason"] == ("stop" if EOS in expected else "length")


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(url: str, temperature: float) -> None:
    # 2,048 draws of two tokens: a chi-square of 30 degrees of freedom at most is above 70 once in 20,000 such tests.
    counts: Counter[tuple[int, ...]] = Counter()
    for request in range(8):
        body = {"prompt": [[BOS, 0]], "n": 256, "max_tokens": 2, "seed": 1000 * request}
        for choice in complete(url, temperature=temperature, return_token_ids=True, **body):
            counts[tuple(choice["token_ids"])] += 1

    def tempered(context: list[int]) -> torch.Tensor:
        return torch.softmax(TABLE.row(context) / temperature, -1)

    first = tempered([0])
    expected = {(x, y): first[x].item() * tempered([0, x])[y].item() for x in range(4) for y in range(6)}
    expected = {string: p for string, p in expected.items() if p > 0} | {(EOS,): first[EOS].item()}
    expected = {string: p for string, p in expected.items() if p > 0}
    assert sum(expected.values()) == pytest.approx(1)
    assert counts.keys() <= expected.keys()
    likely = [string for string, p in expected.items() if 2048 * p >= 5]
    rest = 1 - sum(expected[string] for string in likely)
    chi = sum((counts[s] - 2048 * expected[s]) ** 2 / (2048 * expected[s]) for s in likely)
    if rest > 1e-9:
        chi += (2048 - sum(counts[s] for s in likely) - 2048 * rest) ** 2 / (2048 * rest)
    assert len(likely) <= 30 and chi < 70


def test_a_seed_gives_the_same_choice_in_any_company(url: str) -> None:
    alone = [complete(url, prompt=prompt, n=2, seed=7, max_tokens=8) for prompt in ("ab", "c")]
    together = complete(url, prompt=["ab", "c"], n=2, seed=7, max_tokens=8)
    assert [choice["text"] for choice in together] == [choice["text"] for one in alone for choice in one]
    others = {complete(url, prompt="ab", seed=seed, max_tokens=8)[0]["text"] for seed in range(8)}
    assert len(others) > 1


def test_stop_strings_end_the_text(url: str) -> None:
    whole = complete(url, prompt="a", seed=3, max_tokens=30, n=20)
    cut = complete(url, prompt="a", seed=3, max_tokens=30, n=20, stop=["cd", "bb"])
    assert any(choice["finish_reason"] == "stop" for choice in cut)
    for before, after in zip(whole, cut, strict=True):
        text = before["text"]
        places = [at for at in (text.find("cd"), text.find("bb")) if at >= 0]
        assert after["text"] == (text[: min(places)] if places else text)
        assert after["finish_reason"] == ("stop" if places else before["finish_reason"])


def test_logprobs_are_the_models_own(url: str) -> None:
    (choice,) = complete(
        url, prompt=[[BOS, 0, 1, 2]], echo=True, logprobs=3, prompt_logprobs=2, max_tokens=3, temperature=0.3, seed=1,
        return_token_ids=True,
    )  # fmt: skip
    tokens = [*choice["prompt_token_ids"], *choice["token_ids"]]
    lists = choice["logprobs"]
    assert choice["text"] == TABLE.vocab.decode_text(tokens)
    assert lists["tokens"] == [TABLE.vocab.label(i) for i in tokens]
    assert lists["text_offset"] == [len(TABLE.vocab.decode_text(tokens[:i])) for i in range(len(tokens))]
    assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
    for at in range(1, len(tokens)):
        row = TABLE.row(tokens[1:at]).clamp(min=-9999).tolist()
        best = sorted(range(6), key=lambda i: -row[i])[:3]
        expected = {TABLE.vocab.label(i): row[i] for i in {*best, tokens[at]}}
        assert lists["top_logprobs"][at] == pytest.approx(expected, abs=1e-5)
        assert lists["token_logprobs"][at] == pytest.approx(row[tokens[at]], abs=1e-5)
        if at < 4:
            entry = choice["prompt_logprobs"][at]
            assert {int(i) for i in entry} == {*best[:2], tokens[at]}
            for i, what in entry.items():
                assert what["logprob"] == pytest.approx(row[int(i)], abs=1e-5)
                assert what["rank"] == 1 + sum(value > row[int(i)] for value in row)


def test_tokens_named_by_id(url: str) -> None:
    (choice,) = complete(url, prompt="ab", logprobs=2, max_tokens=1, temperature=0, return_tokens_as_token_ids=True)
    assert all(name.startswith("token_id:") for name in choice["logprobs"]["top_logprobs"][0])


def test_reading_without_generating(url: str) -> None:
    (choice,) = complete(url, prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert choice["text"] == "abc" and len(choice["logprobs"]["tokens"]) == 4
    assert [len(top or {}) for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1, 1]


def test_tokenizing(url: str) -> None:
    assert ask(url, {"prompt": "abd"}, path="/tokenize")[1]["tokens"] == [BOS, 0, 1, 3]
    assert ask(url, {"prompt": "abd", "add_special_tokens": False}, path="/tokenize")[1]["tokens"] == [0, 1, 3]
    assert ask(url, {"content": "abd"}, path="/tokenize")[1] == {"tokens": [0, 1, 3], "count": 3, "max_model_len": None}
    pieces = ask(url, {"content": "d", "with_pieces": True, "add_special": True}, path="/tokenize")[1]["tokens"]
    assert pieces == [{"id": BOS, "piece": ""}, {"id": 3, "piece": "d"}]
    assert ask(url, {"tokens": [BOS, 0, 3]}, path="/detokenize") == (200, {"content": "ad", "prompt": "ad"})
    assert ask(url, {"tokens": []}, path="/detokenize")[1]["content"] == ""
    for body in ({}, {"prompt": "a", "content": "a"}, {"content": "xyz"}):
        assert ask(url, body, path="/tokenize")[0] == 400


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"prompt": "xyz"}, "prompt", "cannot be written in this model's tokens: byte b'x'"),
        ({"prompt": [9]}, "prompt", "token id 9 is outside the vocabulary of 6"),
        ({"prompt": [-1]}, "prompt", "token id -1 is outside"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [[]]}, "prompt", ""),
        ({"prompt": [[0], "a"]}, "prompt", ""),
        ({"prompt": [True]}, "prompt", ""),
        ({"prompt": {"a": 1}}, "prompt", ""),
        ({"prompt": "", "add_special_tokens": False}, "prompt", "the prompt is empty"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 10**9}, "max_tokens", "more than 65536"),
        ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": ["a"] * 20, "n": 20}, "n", "more than 256 sequences"),
        ({"prompt": "a", "logprobs": 7}, "logprobs", "more than this server gives, 6"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "valid integer"),
        ({"prompt": "a", "prompt_logprobs": 99}, "prompt_logprobs", "more than this server gives"),
        ({"prompt": "a", "stop": [""]}, "stop", "must not be empty"),
        ({"prompt": "a", "stream": True}, "stream", "not offered"),
        ({"prompt": "a", "top_p": 0.9}, "top_p", "not offered"),
        ({"prompt": "a", "colour": 1}, "colour", "unknown field 'colour'"),
        ([], None, ""),
        (b"{", None, "JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature", "finite"),
    ],
)
def test_bad_requests_are_explained(url: str, body: Any, param: str | None, words: str) -> None:
    status, answer = ask(url, body)
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    assert words in error["message"] and "\n" not in error["message"]


def test_what_changes_nothing_is_accepted(url: str) -> None:
    neutral = {"top_p": 1.0, "presence_penalty": 0, "stream": False, "user": "me", "best_of": None, "logit_bias": {}}
    plain, same = (
        complete(url, prompt="ab", seed=1, model=m, **extra) for m, extra in ((None, {}), ("little", neutral))
    )
    assert plain == same


def test_other_errors_have_the_same_shape(url: str) -> None:
    status, answer = ask(url, {"prompt": "a", "model": "gpt"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert ask(url, {}, path="/v1/nothing")[0] == 404
    status, answer = ask(url, path="/v1/completions")
    assert status == 405 and "Method Not Allowed" in answer["error"]["message"]


def test_a_key_keeps_others_out() -> None:
    with serving(TABLE, api_key="sésame") as url:
        for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "a"}), ("/health", None)):
            assert ask(url, body, path=path, key="wrong")[0] == 401
        status, answer = ask(url, {"prompt": "a"})
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
    with serving(TABLE, api_key="sesame") as url:
        assert ask(url, {"prompt": "a"}, key="sesame")[0] == 200
        assert ServerModel(url, api_key="sesame").name == "table"


def test_requests_side_by_side(url: str) -> None:
    expected = {seed: complete(url, prompt="ab", seed=seed, max_tokens=6)[0]["text"] for seed in range(6)}
    found: dict[int, str] = {}

    def one(seed: int) -> None:
        found[seed] = complete(url, prompt="ab", seed=seed, max_tokens=6)[0]["text"]

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == expected


def test_the_context_is_kept() -> None:
    model = NgramModel.from_text("abracadabra", Vocab([b"a", b"b", b"c", b"d", b"r"]), order=3)
    model.context_length = 6
    with serving(model) as url:
        assert len(complete(url, prompt="abra", max_tokens=3, return_token_ids=True)[0]["token_ids"]) == 3
        status, answer = ask(url, {"prompt": "abra", "max_tokens": 4})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        assert ServerModel(url).context_length == 6
        # A text of several windows, read with the server's own vocabulary.
        there, here = (nextoken.read(m, "abracadabra", overlap=2) for m in (ServerModel(url), model))
        assert there.column("logprob") == pytest.approx(here.column("logprob"), abs=1e-6)


def same_reading(local: Any, url: str, text: str | list[str], **options: Any) -> None:
    """Reading through the server is reading the model."""
    there, here = nextoken.read(ServerModel(url, **options), text, top=5), nextoken.read(local, text, top=5)
    assert there.metadata.is_partial and not here.metadata.is_partial
    for name in ("token_id", "byte_start", "byte_end"):
        assert there.column(name).tolist() == here.column(name).tolist()
    assert there.column("logprob") == pytest.approx(here.column("logprob"), abs=1e-4)
    for told, listed in zip(there.column("top_logprobs"), here.column("top_logprobs"), strict=True):
        assert told == pytest.approx(listed, abs=1e-4)
    assert (there.column("entropy_lower") <= here.column("entropy") + 1e-4).all()
    assert (here.column("entropy") <= there.column("entropy_upper") + 1e-4).all()
    known = there.column("rank") >= 0
    assert known.any() and (there.column("rank")[known] == here.column("rank")[known]).all()
    assert there.summary()["unknown"] == 0
    assert there.summary()["nats"] == pytest.approx(here.summary()["nats"], abs=1e-2)


def test_reading_a_table_through_the_server(url: str) -> None:
    texts = ["".join(letters) for letters in itertools.product("abcd", repeat=2)]
    possible = [t for t in texts if math.isfinite(float(nextoken.read(TABLE, t).column("logprob").sum()))]
    assert len(possible) > 4
    same_reading(TABLE, url, possible, tokenizer=TABLE.vocab, top=5)
    same_reading(TABLE, url, possible, top=5)


def test_reading_nano_through_the_server() -> None:
    nano = nextoken.load("nano")
    text = "Alice was beginning to get very tired: “naïve 😀”, she said, €5.\n"
    with serving(nano) as url:
        model = ServerModel(url)
        assert model.vocab.encode(text) == nano.vocab.encode(text)
        assert (model.digest, model.context_length, model.vocab.bos_id) == (
            nano.digest, nano.context_length, nano.vocab.bos_id,
        )  # fmt: skip
        same_reading(nano, url, text)
        same_reading(nano, url, text, tokenizer=nano.vocab, top=100)
        check_language_model(model, length=6, tolerance=1e-3)


def test_a_partial_model_cannot_be_served(url: str) -> None:
    with pytest.raises(ModelError, match="cannot be served"):
        create_app(ServerModel(url))


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(NextokenError, match=r"cannot serve on 127\.0\.0\.1:"):
            serve(TABLE, port=taken.getsockname()[1])


def test_the_server_ends_with_its_block() -> None:
    with serving(TABLE) as url:
        assert ask(url, path="/health")[0] == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(url + "/health", timeout=2)

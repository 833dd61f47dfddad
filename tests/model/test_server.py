"""ServerModel against the table model that each server answers from: every dialect, every kind of trouble."""

from __future__ import annotations

import math
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextoken
from model.fake_servers import Reply, error, fake, llama_cpp, models, openai, python_llama, vllm
from nextoken.errors import ModelError
from nextoken.model._answers import from_lists
from nextoken.model._http import Connection
from nextoken.model._server_vocab import CAPACITY, _spelled, placed
from nextoken.model.server import ServerModel
from nextoken.model.table import TableModel
from nextoken.model.vocab import Vocab
from nextoken.testing import check_language_model

TABLE = TableModel.random(["a", "b", "c", "d", "e", "f"], order=2, eos=True, zeros=0.2, seed=3)
BOS = 6
EURO = TableModel.random(["a", "b", " ", b"\xe2\x82", b"\xac", b"\xe2"], order=2, seed=5)
# The letters of a sentence that is tried on servers whose tokens are not known.
LETTERS = TableModel.random([*"One, twoadhrbc", b"\xe2\x82", b"\xac"], order=1, seed=6)
ROW = [[BOS, 0, 1, 2, 3, 3, 5, 0]]
TARGETS = torch.tensor([[0, 1, 2, 3, 3, 5, 0, 4]])


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses between retries, noted instead of waited for."""
    noted: list[float] = []
    monkeypatch.setattr("nextoken.model._http.time.sleep", noted.append)
    return noted


def agrees(model: ServerModel, table: TableModel = TABLE, *, top: int = 3, beside: bool = True) -> None:
    """What the server tells of ROW equals the table's own statistics, and the entropy lies within the bounds."""
    truth = table.predict(ROW).statistics(TARGETS, top=top)
    told = model.predict(ROW).statistics(TARGETS, top=top)
    assert told.logprob is not None and told.rank is not None and told.top_ids is not None
    assert truth.logprob is not None and truth.rank is not None and truth.top_ids is not None
    assert told.top_logprobs is not None and truth.top_logprobs is not None
    assert torch.equal(told.top_ids, truth.top_ids)
    assert torch.allclose(told.top_logprobs, truth.top_logprobs, atol=1e-6)
    assert torch.allclose(told.rest_mass, truth.rest_mass, atol=1e-6)
    assert torch.allclose(told.margin, truth.margin, atol=1e-6)
    listed = (truth.top_ids == TARGETS[..., None]).any(-1)
    known = torch.ones_like(listed) if beside else listed
    assert torch.allclose(told.logprob[known], truth.logprob[known], atol=1e-6)
    assert told.logprob[~known].isnan().all()
    assert torch.equal(told.rank[listed], truth.rank[listed])
    assert (told.rank[~listed] == -1).all()
    assert not listed.all() and listed.any(), "the example has both"
    assert (told.entropy_lower <= truth.entropy + 1e-6).all()
    assert (truth.entropy <= told.entropy_upper + 1e-6).all()


def test_vllm() -> None:
    with fake(vllm(TABLE)) as server:
        model = ServerModel(server.url + "/v1/", tokenizer=TABLE.vocab, top=3)
        assert (model.dialect.reading, model.dialect.ids, model.dialect.named_by_id) == ("prompt_logprobs", True, True)
        agrees(model)
        before = len(server.requests)
        agrees(model)
        # A row is one request: the last target is read with it.
        assert len(server.requests) == before + 1
        check_language_model(model, tolerance=1e-6)


def test_a_server_that_gives_fewer_logprobs_is_asked_for_fewer() -> None:
    with fake(vllm(TABLE, most=5)) as server:
        assert ServerModel(server.url, tokenizer=TABLE.vocab).dialect.top == 5
        with pytest.raises(ModelError, match="greater than max allowed: 5"):
            ServerModel(server.url, tokenizer=TABLE.vocab, top=6)


def test_the_context_leaves_room_for_what_the_server_generates() -> None:
    with fake(vllm(TABLE, context=10)) as server:
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3)
        assert model.context_length == 8
        agrees(model)  # a row of 8 and its target
        with pytest.raises(ValueError, match="do not fit the context"):
            model.predict([ROW[0] + [1]])


def test_openai_echo() -> None:
    with fake(openai(TABLE)) as server:
        model = ServerModel(server.url, tokenizer=TABLE.vocab)
        assert (model.dialect.reading, model.dialect.named_by_id, model.dialect.top) == ("echo", False, 5)
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3)
        agrees(model)
        check_language_model(model, tolerance=1e-6)


def test_llama_cpp_one_request_per_token() -> None:
    with fake(llama_cpp(TABLE)) as server:
        with pytest.warns(UserWarning, match="one request per token"):
            model = ServerModel(server.url, top=3)
        assert (model.dialect.reading, model.vocab.size, model.vocab.bos_id) == (None, TABLE.vocab.size, BOS)
        assert model.vocab.encode("abc") == TABLE.vocab.encode("abc")
        before = len(server.requests)
        agrees(model, beside=False)
        assert 0 < len(server.requests) - before <= 4  # 8 prefixes in one batch, and the tries where an end was drawn
        check_language_model(model, tolerance=1e-6)


def test_python_llama_takes_text() -> None:
    with fake(python_llama(TABLE)) as server:
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3)
        assert (model.dialect.reading, model.dialect.ids, model.dialect.batch) == ("echo", False, 1)
        assert model.dialect.adds_bos
        truth = TABLE.predict(ROW).statistics(TARGETS, top=3)
        told = model.predict(ROW).statistics(TARGETS, top=3)
        assert told.logprob is not None and truth.logprob is not None
        # Of the first token after <bos> this server tells nothing.
        assert told.logprob[0, 0].isnan() and told.entropy_upper[0, 0].item() == pytest.approx(math.log(8))
        assert torch.allclose(told.logprob[0, 1:], truth.logprob[0, 1:], atol=1e-6)
        assert (told.entropy_lower <= truth.entropy + 1e-6).all() and (truth.entropy <= told.entropy_upper + 1e-6).all()
        with pytest.raises(ModelError, match="rows must begin with it"):
            model.predict([[0, 1]]).statistics(top=1)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_shared_names_are_never_taken_for_one_token(top: int) -> None:
    # In EURO's table three tokens are parts of characters: a server that drops those parts calls all of them "".
    row = [6, 0, 3, 4, 1, 2, 3, 4, 0, 0, 2, 1, 1, 2]
    targets = torch.tensor([[*row[1:], 0]])
    truth, p = EURO.predict([row]).statistics(targets, top=top), EURO.predict([row]).log_probs()
    with fake(python_llama(EURO)) as server:
        told = ServerModel(server.url, tokenizer=EURO.vocab, top=top).predict([row]).statistics(targets, top=top)
    assert told.logprob is not None and truth.logprob is not None and told.rank is not None
    assert truth.rank is not None and told.top_ids is not None and told.top_logprobs is not None
    assert torch.allclose(told.logprob[0, 1:], truth.logprob[0, 1:], atol=1e-6)
    ranked, known = told.rank >= 0, ~told.top1_prob.isnan()
    assert torch.equal(told.rank[ranked], truth.rank[ranked])
    assert torch.allclose(told.top1_prob[known], truth.top1_prob[known], atol=1e-6)
    assert not known.all(), "in some places the list may lack a token"
    assert known.any() == (top < 4), "no four different names are ever the four best"
    named = told.top_ids >= 0
    listed = p.gather(-1, told.top_ids.clamp(min=0)).float()
    assert named.any() and torch.allclose(told.top_logprobs[named], listed[named], atol=1e-6)
    assert (told.entropy_lower <= truth.entropy + 1e-6).all() and (truth.entropy <= told.entropy_upper + 1e-6).all()


def test_an_echo_that_is_out_of_step_is_not_believed() -> None:
    with fake(python_llama(TABLE, adds_bos=False, aligned=False)) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = TABLE.vocab
        with pytest.raises(ModelError, match="no begin token"):
            ServerModel(server.url, tokenizer=table, top=3).predict(ROW).statistics(top=1)
        model = ServerModel(server.url, tokenizer=Vocab([*table.token_bytes[:6], b"", b""]), top=3)
        assert model.dialect.reading is None


def test_other_tokens_than_fed_are_an_error() -> None:
    with fake(python_llama(TABLE, strange=True)) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3)
        assert model.dialect.reading is None  # the probe came back in another order


def test_without_any_tokenizer_the_vocabulary_grows() -> None:
    with fake(python_llama(LETTERS)) as server:
        model = ServerModel(server.url, top=3)
        assert model.vocab.size == CAPACITY and model.vocab.bos_id is None
        text = "Oh, bad owe"
        ids = model.vocab.encode(text).ids
        assert model.vocab.decode(ids) == text.encode() and len(set(ids)) == len(set(text))
        signature, truth = nextoken.read(model, text, top=3), nextoken.read(LETTERS, text, top=3)
        # The first token of the text is told nothing about, so the second is the first row.
        assert signature.column("logprob") == pytest.approx(truth.column("logprob")[1:], abs=1e-6)
        assert (signature.column("entropy_upper") == math.inf).all()  # nobody said how many tokens there are
        for told, listed in zip(signature.column("top_ids"), truth.column("top_ids")[1:], strict=True):
            if not set(listed) & {14, 15}:
                assert [model.vocab.label(i) for i in told] == [LETTERS.vocab.label(i) for i in listed]


def test_a_text_with_characters_cut_in_parts_is_sent_as_it_was() -> None:
    with fake(python_llama(LETTERS)) as server:
        model = ServerModel(server.url, top=4)
        signature, truth = nextoken.read(model, "a€b€", top=2), nextoken.read(LETTERS, "a€b€", top=2)
        assert signature.column("logprob") == pytest.approx(truth.column("logprob")[1:], abs=1e-6)
        assert signature.text() == "a€b€"


def test_reading_with_a_vocabulary_asked_for_at_vllm() -> None:
    with fake(vllm(TABLE)) as server:
        model = ServerModel(server.url, top=3)
        assert (model.vocab.bos_id, model.vocab.size) == (BOS, CAPACITY)
        assert model.vocab.encode("fade") == TABLE.vocab.encode("fade")
        signature, truth = nextoken.read(model, ["fade", "bad"]), nextoken.read(TABLE, ["fade", "bad"])
        assert signature.column("logprob") == pytest.approx(truth.column("logprob"), abs=1e-6)
        assert signature.column("token_id").tolist() == truth.column("token_id").tolist()
        assert signature.summary()["unknown"] == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_any_target_is_read(vllm_model: ServerModel, row: list[int], top: int, target: int) -> None:
    targets = torch.full((1, len(row)), target)
    told, truth = (m.predict([row]).statistics(targets, top=top) for m in (vllm_model, TABLE))
    assert told.logprob is not None and truth.logprob is not None
    assert torch.allclose(told.logprob.exp(), truth.logprob.exp(), atol=1e-6)


@pytest.fixture(scope="module")
def vllm_model() -> Iterator[ServerModel]:
    with fake(vllm(TABLE)) as server:
        yield ServerModel(server.url, tokenizer=TABLE.vocab, top=3)


def test_whole_distributions_are_refused(vllm_model: ServerModel) -> None:
    following = vllm_model.predict(ROW)
    assert following.is_partial and vllm_model.is_partial and following.hidden is None
    with pytest.raises(ModelError, match="not the whole distribution"):
        following.log_probs()
    with pytest.raises(ModelError, match="without changing it"):
        following.sample()


# Trouble


def broken(reply: Callable[[str, Any], Reply], times: int, status: int, body: Any) -> Callable[[str, Any], Reply]:
    """`reply`, but the first `times` requests for completions after the dialect was found end in trouble."""
    left = [times]

    def answer(path: str, request: Any) -> Reply:
        if (
            path == "/v1/completions"
            and request.get("prompt_logprobs")
            and request["prompt"] == [ROW[0] + [4]]
            and left[0]
        ):
            left[0] -= 1
            return status, body
        return reply(path, request)

    return answer


@pytest.mark.parametrize(
    ("status", "body"), [(503, {"message": "busy"}), (429, b""), (500, b"<html>"), (200, None)], ids=str
)
def test_passing_trouble_is_tried_again(status: int, body: Any, pauses: list[float]) -> None:
    with fake(broken(vllm(TABLE), 2, status, body)) as server:
        agrees(ServerModel(server.url, tokenizer=TABLE.vocab, top=3))
        assert len(pauses) == 2
        assert 0.25 <= pauses[0] <= 0.75 and 0.5 <= pauses[1] <= 1.5


def test_lasting_trouble_is_an_error_after_the_retries(pauses: list[float]) -> None:
    with fake(broken(vllm(TABLE), 99, 503, {"error": {"message": "no\n workers"}})) as server:
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3, retries=2)
        before = len(server.requests)
        with pytest.raises(ModelError, match=r"answered 503: no workers$"):
            model.predict(ROW).statistics(TARGETS)
        assert len(server.requests) - before == 3 and len(pauses) == 2


def test_refusals_are_not_tried_again(pauses: list[float]) -> None:
    with fake(broken(vllm(TABLE), 99, 400, {"error": {"message": "too long"}})) as server:
        model = ServerModel(server.url, tokenizer=TABLE.vocab, top=3)
        before = len(server.requests)
        with pytest.raises(ModelError, match="answered 400: too long"):
            model.predict(ROW).statistics(TARGETS)
        assert len(server.requests) - before == 1 and pauses == []


def test_retry_after_is_kept(pauses: list[float]) -> None:
    state = iter([(429, b""), models("x")])

    class Asked(Connection):
        def _status(self, error: Any, path: str) -> Exception:
            error.headers["Retry-After"] = "7"
            return super()._status(error, path)

    with fake(lambda path, body: next(state)) as server:
        Asked(server.url).get("/v1/models")
        assert pauses == [7.0]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_an_unreachable_server(pauses: list[float]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError, match=rf"cannot reach {url}: .*Is the server running\?"):
        ServerModel(url)
    assert pauses == []  # nobody is there: trying again would only keep the person waiting


def test_a_server_that_says_nothing() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(ModelError, match=r"did not answer within 0\.2 seconds"):
            ServerModel(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.2)


def test_models_are_chosen_by_name() -> None:
    two: Reply = (200, {"data": [{"id": "m"}, {"id": "n"}]})
    with fake(lambda path, body: two if path == "/v1/models" else vllm(TABLE)(path, body)) as server:
        with pytest.raises(ModelError, match=r"has m, n: say which one \(model=\)"):
            ServerModel(server.url)
        with pytest.raises(ModelError, match="has no model 'q'; it has m, n"):
            ServerModel(server.url, model="q")
        assert ServerModel(server.url, model="n", tokenizer=TABLE.vocab).name == "n"
        assert server.requests[-1][1]["model"] == "n"
    with fake(lambda path, body: (404, {}) if path == "/v1/models" else vllm(TABLE)(path, body)) as server:
        with pytest.raises(ModelError, match="does not list its models"):
            ServerModel(server.url)
        assert ServerModel(server.url, model="n", tokenizer=TABLE.vocab).name == "n"


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def guarded(path: str, body: Any) -> Reply:
        given = server.requests[-1][2].get("Authorization")
        return vllm(TABLE)(path, body) if given == "Bearer right" else error(401, f"no such key: {given}")

    with fake(guarded) as server:
        with pytest.raises(ModelError, match=r"refused access \(401\): it wants an API key: pass api_key="):
            ServerModel(server.url)
        with pytest.raises(ModelError, match="was not accepted") as refused:
            ServerModel(server.url, api_key="sk-wrong")
        assert "sk-wrong" not in str(refused.value)
        model = ServerModel(server.url, tokenizer=TABLE.vocab, api_key="right")
        assert "right" not in repr(vars(model))
        monkeypatch.setenv("NEXTOKEN_API_KEY", "right")
        assert ServerModel(server.url, tokenizer=TABLE.vocab).name == "m"
    with fake(lambda path, body: error(400, "bad sk-secret")) as server, pytest.raises(ModelError, match=r"bad \*\*\*"):
        ServerModel(server.url, api_key="sk-secret")


def test_addresses_that_are_none() -> None:
    for url in ("localhost:8000", "ftp://host", "http://"):
        with pytest.raises(ModelError, match="is not the address of a server"):
            ServerModel(url)
    with pytest.raises(ModelError, match="pass api_key= instead") as refused:
        ServerModel("http://me:hush@host")
    assert "hush" not in str(refused.value)
    with (
        fake(lambda path, body: (307, b"")) as server,
        pytest.raises(ModelError, match="redirects to http://elsewhere"),
    ):
        ServerModel(server.url, api_key="sk")


def test_answers_in_another_form() -> None:
    with fake(lambda path, body: (200, b"<html>hello")) as server, pytest.raises(ModelError, match="no JSON: '<html>"):
        ServerModel(server.url)
    with fake(lambda path, body: (200, ["m"])) as server, pytest.raises(ModelError, match="form that is not OpenAI"):
        ServerModel(server.url)

    def silent(path: str, body: Any) -> Reply:
        empty = {"choices": [{"index": 0, "text": "x", "logprobs": None}]}
        return models("x") if path == "/v1/models" else (200, empty)

    with fake(silent) as server, pytest.raises(ModelError, match="gives no log-probabilities of m"):
        ServerModel(server.url, tokenizer=TABLE.vocab)

    def refusing(path: str, body: Any) -> Reply:
        return models("x") if path == "/v1/models" else error(400, "logprobs is not supported")

    with fake(refusing) as server, pytest.raises(ModelError, match="logprobs is not supported"):
        ServerModel(server.url, tokenizer=TABLE.vocab)


def test_a_tokenizer_of_another_model() -> None:
    with fake(llama_cpp(TABLE)) as server, pytest.raises(ModelError, match="has 7 tokens, but the server's model 8"):
        ServerModel(server.url, tokenizer=TableModel.random(6).vocab)
    with fake(vllm(TABLE)) as server, pytest.raises(ModelError, match="cannot load the tokenizer nowhere/at-all"):
        ServerModel(server.url, tokenizer="nowhere/at-all")


# Parts


def test_pieces_are_placed_in_the_text() -> None:
    assert placed([b"a", b" b", b"c"], b"a bc") == [(0, 1), (1, 3), (3, 4)]
    lost = "�".encode()
    assert placed([lost, b"a"], b"aa") == [(0, 1), (1, 2)]
    assert placed([b"a", lost, lost, b"b"], "a€b".encode()) == [(0, 1), (1, 4), (1, 4), (4, 5)]
    assert placed([b" Hi", b" you"], b"Hi you") == [(0, 2), (2, 6)]
    assert placed([b"Hi", b"you"], b"Hi you") == [(0, 2), (2, 6)]
    assert placed([b"hi", lost], b"HI!") == [(0, 3), (0, 3)]


@given(st.lists(st.sampled_from(["a", "b", " ", "ab", "€", "😀"]), max_size=8), st.data())
def test_placing_covers_the_text(parts: list[str], data: st.DataObject) -> None:
    pieces = [part.encode() if data.draw(st.booleans()) else "�".encode() for part in parts]
    text = "".join(parts).encode()
    spans = placed(pieces, text)
    assert len(spans) == len(pieces)
    assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
    assert all(0 <= begin <= end <= len(text) for begin, end in spans)
    if all(piece == part.encode() for piece, part in zip(pieces, parts, strict=True)):
        assert b"".join(text[begin:end] for begin, end in spans) == text


def test_pieces_of_tokenizers_are_spelled() -> None:
    assert _spelled(["He", "Ġyou", "Ċ", "âĤ"]) == [b"He", b" you", b"\n", b"\xe2\x82"]
    assert _spelled(["▁He", "<0xE2>", "y"]) == [b" He", b"\xe2", b"y"]
    assert _spelled(["he", None]) == [None, None]


def test_a_list_that_shares_a_name_is_not_complete() -> None:
    def told(top: dict[str, float], token: str, value: float) -> Any:
        lists = {"tokens": [token], "token_logprobs": [value], "top_logprobs": [top]}
        return from_lists(lists, 0, 3, 9, lambda name: {"a": 0, "b": 1, "c": 2}.get(name, -1), came=5)

    clean = told({"a": -1.0, "b": -2.0, "c": -3.0, "x": -9.0}, "x", -9.0)
    assert clean.is_complete and clean.came == (5, -9.0) and clean.top == ((0, -1.0), (1, -2.0), (2, -3.0))
    assert told({"a": -1.0, "b": -2.0, "c": -3.0}, "a", -1.0).top[0] == (5, -1.0)
    assert told({"a": -1.0, "x": -2.0, "c": -3.0}, "x", -2.0).is_complete
    # Three names of which the last is the one that came: another of the true three may have shared a name.
    assert not told({"a": -1.0, "b": -2.0, "x": -9.0}, "x", -9.0).is_complete
    assert not told({"a": -1.0, "b": -2.0}, "a", -1.0).is_complete

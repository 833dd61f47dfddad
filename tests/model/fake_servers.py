"""Small HTTP servers that speak the dialects of others, answering from a table model by its own rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nextoken.model.table import TableModel

Reply = tuple[int, Any]


@dataclass
class Fake:
    """What a running fake was asked: (path, body, headers)."""

    url: str
    requests: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)


@contextmanager
def fake(reply: Callable[[str, Any], Reply]) -> Iterator[Fake]:
    """Serve `reply(path, body)` -> (status, JSON, or bytes as they are, or None to break off)."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            running.requests.append((self.path, body, dict(self.headers)))
            try:
                status, found = reply(self.path, body)
            except ValueError as refused:  # a text that the model's tokens cannot write
                status, found = error(400, str(refused))
            if found is None:
                self.connection.close()
                return
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://elsewhere.example/v1/models")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = Fake(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def error(status: int, message: str) -> Reply:
    return status, {"error": {"message": message}}


def best(model: TableModel, context: Sequence[int], k: int) -> list[tuple[int, float]]:
    """The k most probable next tokens, -9999 for log 0."""
    bos = model.vocab.bos_id
    row = model.row(context[1:] if context and context[0] == bos else context).tolist()
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return [(i, max(row[i], -9999.0)) for i in order[:k]]


def said(model: TableModel, context: Sequence[int], token: int) -> float:
    return dict(best(model, context, model.vocab.size))[token]


def models(owner: str, **more: Any) -> Reply:
    return 200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": owner, **more}]}


def vllm(model: TableModel, *, most: int = 20, context: int | None = None) -> Callable[[str, Any], Reply]:
    """Prompts as ids, prompt_logprobs, names by id; at least one token is generated."""

    def reply(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return models("vllm", max_model_len=context)
        if path == "/tokenize":
            if "prompt" not in body:
                return error(400, "prompt: Field required")
            ids = list(model.vocab.encode(body["prompt"]).ids)
            ids = [model.vocab.bos_id, *ids] if body["add_special_tokens"] else ids
            return 200, {"tokens": ids, "count": len(ids)}
        if path == "/detokenize":
            return 200, {"prompt": model.vocab.decode_text(body["tokens"])}
        k = body["logprobs"]
        if max(k, body.get("prompt_logprobs", 0)) > most:
            return error(400, f"Requested sample logprobs of {k}, which is greater than max allowed: {most}")
        if body["max_tokens"] < 1:
            return error(400, "max_tokens must be at least 1")
        choices = []
        for index, ids in enumerate(body["prompt"]):
            if context is not None and len(ids) + 1 > context:
                return error(400, f"maximum context length is {context} tokens")
            top = best(model, ids, k)
            drawn = top[-1][0]
            entry = {f"token_id:{i}": value for i, value in top}
            lists = {"tokens": [f"token_id:{drawn}"], "token_logprobs": [top[-1][1]], "top_logprobs": [entry]}
            prompt: list[Any] = [None]
            for at in range(1, len(ids)):
                listed = best(model, ids[:at], body.get("prompt_logprobs", 1))
                listed += [] if ids[at] in dict(listed) else [(ids[at], said(model, ids[:at], ids[at]))]
                prompt.append({str(i): {"logprob": v, "rank": 1, "decoded_token": "?"} for i, v in listed})
            choice = {"index": index, "text": "", "logprobs": lists}
            choices.insert(0, choice | ({"prompt_logprobs": prompt} if "prompt_logprobs" in body else {}))
        return 200, {"choices": choices}

    return reply


def llama_cpp(model: TableModel) -> Callable[[str, Any], Reply]:
    """Prompts as ids, nothing about them; tokens told with id and bytes; an end token is left out of the answer."""

    def reply(path: str, body: Any) -> Reply:
        vocab = model.vocab
        if path == "/v1/models":
            return models("llamacpp", meta={"n_vocab": vocab.size})
        if path == "/tokenize":
            ids = list(vocab.encode(body["content"]).ids)
            ids = [vocab.bos_id, *ids] if body["add_special"] else ids
            pieces = [{"id": i, "piece": list(vocab.token_bytes[i])} for i in ids]
            return 200, {"tokens": pieces if body["with_pieces"] else ids}
        if path == "/detokenize":
            return 200, {"content": vocab.decode_text(body["tokens"])}
        if body.get("echo"):
            return error(400, "Only no echo is supported")
        choices = []
        for index, ids in enumerate(body["prompt"]):
            top = [{"id": i, "token": vocab.label(i), "logprob": v} for i, v in best(model, ids, body["logprobs"])]
            drawn = best(model, ids, vocab.size)[body["seed"] % vocab.size]
            content = [{"id": drawn[0], "token": "?", "logprob": drawn[1], "top_logprobs": top}]
            choices.append({"index": index, "logprobs": {"content": [] if drawn[0] in vocab.eos_ids else content}})
        return 200, {"choices": choices}

    return reply


def python_llama(
    model: TableModel, *, adds_bos: bool = True, aligned: bool = True, strange: bool = False
) -> Callable[[str, Any], Reply]:
    """Text only, one prompt at a time, echo by token text with parts of characters dropped."""
    vocab = model.vocab

    def named(token: int) -> str:
        return vocab.token_bytes[token].decode("utf-8", errors="ignore")

    def reply(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return models("me")
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not all(isinstance(text, str) for text in prompts):
            return 422, {"detail": [{"msg": "Input should be a valid string"}]}
        if len(prompts) > 1:
            return error(500, "AssertionError")
        cut = vocab.encode(prompts[0]).ids
        cut = tuple(reversed(cut)) if strange else cut
        ids = [vocab.bos_id, *cut] if adds_bos and vocab.bos_id is not None else list(cut)
        k = body.get("logprobs", 0)
        drawn = best(model, ids, 1)[0][0]
        shown = [*cut, drawn] if body.get("echo") else [drawn]
        first = len(ids) - len(cut) if body.get("echo") else len(ids)
        whole = [*ids, drawn]
        tokens, values, tops = [], [], []
        for place, token in enumerate(shown):
            before = whole[: first + place + (0 if aligned else 1)]
            top = {named(i): value for i, value in best(model, before, k)}
            top[named(token)] = said(model, before, token)
            null = bool(body.get("echo")) and place == 0
            tokens.append(named(token))
            values.append(None if null else top[named(token)])
            tops.append(None if null else top)
        lists = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
        return 200, {
            "choices": [{"index": 0, "logprobs": lists}],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 1},
        }

    return reply


def openai(model: TableModel, *, most: int = 5) -> Callable[[str, Any], Reply]:
    """Prompts as ids and echo by token text; fields it does not know are refused."""
    known = {"model", "prompt", "max_tokens", "temperature", "seed", "logprobs", "echo"}

    def reply(path: str, body: Any) -> Reply:
        if path == "/v1/models":
            return models("someone")
        if path != "/v1/completions":
            return error(404, "Unknown request URL")
        if body.keys() - known:
            return error(400, f"Unrecognized request argument supplied: {sorted(body.keys() - known)[0]}")
        if body["logprobs"] > most:
            return error(400, f"{body['logprobs']} is greater than the maximum of {most} - 'logprobs'")
        choices = []
        for index, ids in enumerate(body["prompt"]):
            whole = [*ids, best(model, ids, 2)[1][0]]
            start = 0 if body.get("echo") else len(ids)
            tops: list[Any] = []
            for place in range(start, len(whole)):
                top = {model.vocab.label(i): v for i, v in best(model, whole[:place], body["logprobs"])}
                tops.append(top | {model.vocab.label(whole[place]): said(model, whole[:place], whole[place])})
            tops[0] = None if start == 0 else tops[0]
            names = [model.vocab.label(i) for i in whole[start:]]
            values = [None if top is None else top[name] for name, top in zip(names, tops, strict=True)]
            lists = {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": [0] * len(names)}
            choices.append({"index": index, "logprobs": lists})
        return 200, {"choices": choices}

    return reply

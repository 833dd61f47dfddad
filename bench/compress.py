"""Lossless compression with the bundled models, beside xz, bzip2 and zstd, on texts that no model was trained on.

    python bench/compress.py --data ../shared/data --json bench/results/compress.json

Of each text the first `--bytes`, coded in `--streams` streams and decoded again (it must come back). Sizes are those of
whole files, headers included; `surprisal` is what `nextoken.read` says that the same text costs in one piece, the bound
that one stream comes near. Times are processor seconds on one thread.

    xz, bzip2, zstd    as they are, on the same bytes
    zstd, primed       zstd -19 that may refer to as many bytes of the training books as the model's weights have: what
                       there is to gain from knowing other books, without a model
    whole              xz on the whole text: it gains from length, and the models (1,024 tokens of context) do not

`streams` tells what more streams cost and gain, on a shorter piece. `capacity` is the information capacity of both
models: bits saved per token over log2 of operations per token, on documents of 1,023 tokens, with the paper's offset
for English text and with the one that makes the two models equal.
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nextoken
from nextoken.model.hf import HFModel
from nextoken.model.loading import bundled_names, bundled_path
from nextoken.scores.capacity import OFFSETS, Capacity, fit_offset, flops_per_token, information_capacity
from nextoken.scores.coder import compress, decompress
from record import write

TEXTS = ("books/frankenstein.txt", "books/the-time-machine.txt", "wikitext2/test.txt")
HELD_OUT = ("frankenstein.txt", "the-time-machine.txt")


def bits_per_byte(size: int, data: bytes) -> float:
    return round(8 * size / len(data), 3)


def timed(call: Callable[[], bytes]) -> tuple[bytes, float]:
    start = time.process_time()
    return call(), time.process_time() - start


def xz(data: bytes) -> bytes:
    return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)


def zstd(data: bytes, *options: str) -> bytes:
    return subprocess.run(["zstd", "-q", "-c", *options], input=data, capture_output=True, check=True).stdout


def primed(data: bytes, books: bytes) -> bytes:
    """zstd with the books before the text."""
    with tempfile.TemporaryDirectory() as folder:
        before, source = Path(folder) / "books", Path(folder) / "text"
        before.write_bytes(books)
        source.write_bytes(data)
        options = ["-q", "-c", "-19", "--long=27", f"--patch-from={before}", str(source)]
        return subprocess.run(["zstd", *options], capture_output=True, check=True).stdout


def by_model(model: HFModel, data: bytes, streams: int) -> dict[str, Any]:
    code, there = timed(lambda: compress(model, data, streams=streams))
    again, back = timed(lambda: decompress(model, code))
    assert again == data
    bits = nextoken.read(model, data.decode(), top=0, progress=False).summary()["bits"]
    return {
        "streams": streams,
        "size": len(code),
        "bits_per_byte": bits_per_byte(len(code), data),
        "surprisal_bits_per_byte": round(bits / len(data), 3),
        "bytes_per_second_coding": round(len(data) / there),
        "bytes_per_second_decoding": round(len(data) / back),
    }


def by_peers(data: bytes, whole: bytes, books: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, call in (("xz -9e", xz), ("bzip2 -9", bz2.compress)):
        code, seconds = timed(lambda call=call: call(data))  # type: ignore[misc]
        found[name] = {"size": len(code), "bytes_per_second_coding": round(len(data) / seconds)}
    if shutil.which("zstd"):
        for name, options in (("zstd -19", ["-19"]), ("zstd --ultra -22", ["--ultra", "-22"])):
            found[name] = {"size": len(zstd(data, *options))}
        for name, text in books.items():
            found[f"zstd -19, primed with {len(text):,} bytes ({name})"] = {"size": len(primed(data, text))}
    for entry in found.values():
        entry["bits_per_byte"] = bits_per_byte(entry["size"], data)
    found["xz -9e, whole"] = {"bits_per_byte": bits_per_byte(len(xz(whole)), whole)}
    return found


def capacities(models: dict[str, HFModel], texts: dict[str, bytes]) -> dict[str, Any]:
    """Information capacity on all texts together, in documents of 1,023 tokens."""
    found: dict[str, Capacity] = {}
    for name, model in models.items():
        documents = []
        for data in texts.values():
            ids = model.vocab.encode(data.decode()).ids
            documents += [model.vocab.decode(ids[at : at + 1023]) for at in range(0, len(ids) - 1022, 1023)]
        signature = nextoken.read(model, documents, top=0, progress=False)
        found[name] = information_capacity(signature, flops=flops_per_token(model))
    offset = fit_offset([list(found.values())])
    english = OFFSETS["english"]
    return {
        "offset_that_makes_them_equal": round(offset, 2),
        "models": {
            name: {
                "tokens": one.tokens,
                "text_bits_per_token": round(one.text_bits, 2),
                "model_bits_per_token": round(one.model_bits, 2),
                "flops_per_token": round(one.flops),
                "capacity_without_offset": round(one.value, 4),
                "capacity_with_the_papers_english_offset": round((one.gain + english) / (one.gain / one.value), 4),
                "capacity_with_their_own_offset": round((one.gain + offset) / (one.gain / one.value), 4),
            }
            for name, one in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with books/ and wikitext2/")
    parser.add_argument("--bytes", type=int, default=32_768, help="of each text")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--short", type=int, default=4_096, help="bytes for the comparison of streams")
    parser.add_argument("--json", default="bench/results/compress.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = {name: model for name in bundled_names() if isinstance(model := nextoken.load(name), HFModel)}
    weights = {name: (bundled_path(name) / "model.safetensors").stat().st_size for name in models}
    shelf = sorted(path for path in (arguments.data / "books").glob("*.txt") if path.name not in HELD_OUT)
    training = b"".join(path.read_bytes() for path in shelf)
    books = {name: training[: weights[name]] for name in models}
    texts, figures = {}, {"bytes_of_each_text": arguments.bytes, "bytes_of_weights": weights, "texts": {}}
    for text in TEXTS:
        whole = (arguments.data / text).read_bytes()
        data = whole[: arguments.bytes].decode(errors="ignore").encode()
        texts[text] = data
        found = {name: by_model(model, data, arguments.streams) for name, model in models.items()}
        figures["texts"][text] = found | by_peers(data, whole, books)
        print(text)
        for name, entry in figures["texts"][text].items():
            speed = entry.get("bytes_per_second_decoding")
            print(f"  {name:50} {entry['bits_per_byte']:6.3f} bits/byte" + (f"  {speed:,} bytes/s" if speed else ""))
    short = texts[TEXTS[0]][: arguments.short].decode(errors="ignore").encode()
    figures["streams"] = {"text": TEXTS[0], "bytes": len(short), "models": {}}
    for name, model in models.items():
        figures["streams"]["models"][name] = [by_model(model, short, streams) for streams in (1, 8, 32)]
        for entry in figures["streams"]["models"][name]:
            print(
                f"  {name}, {entry['streams']} streams: {entry['size']} bytes, {entry['bytes_per_second_coding']:,}/s"
            )
    figures["capacity"] = capacities(models, texts)
    for name, entry in figures["capacity"]["models"].items():
        print(f"  capacity of {name}: {entry}")
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

"""Reading through servers beside reading the same model in this process.

    python bench/server.py --llama-python /path/to/venv/bin/python

The bundled model nano reads a text itself, through nextoken's own service, and through the server of llama-cpp-python,
for which its weights are written as GGUF in float32 (package gguf). Reported are the least seconds of three readings,
the largest difference of a log-probability, what share of tokens and of the alternatives' ids is known, and whether the
entropy lies within the bounds.

Without --llama-python or the environment variable LLAMA_PYTHON, llama-cpp-python[server] is installed into a new
environment first, which compiles for several minutes; if that fails the reason is written down instead.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import nextoken
import record
from nextoken.app.service import serving
from nextoken.model import LanguageModel, bundled_path
from nextoken.model.server import ServerModel

TEXT = Path(__file__).parents[1] / "tests" / "data" / "alice.txt"
BUILD_SECONDS = 1500


def write_gguf(source: Path, target: Path) -> None:
    """A Llama model in the layout of Hugging Face as GGUF, float32, with its byte-level BPE."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((source / "config.json").read_text())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_name(source.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    pieces = {token_id: piece for piece, token_id in tokenizer["model"]["vocab"].items()}
    pieces |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    # Nearest of llama.cpp's own splitting rules: GPT-2's with single digits.
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([pieces[i] for i in range(config["vocab_size"])])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(config["vocab_size"])]
    )
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{layer}.{hf}": f"blk.{layer}.{ours}" for hf, ours in parts.items()}
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        for key, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if key in name:
                # llama.cpp turns neighbouring pairs, Hugging Face the two halves of a head.
                halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(folder: Path) -> str:
    """A Python with llama-cpp-python[server], in a new environment."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "llama-cpp-python[server]"]
    environment = os.environ | {"CMAKE_ARGS": "-DGGML_NATIVE=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS, env=environment)
    return python


@contextmanager
def llama_server(python: str, model: Path, log: Path) -> Iterator[str]:
    """The address of a running llama-cpp-python server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": model, "port": port, "logits_all": "true", "n_ctx": 1024, "n_batch": 1024, "n_threads": 2}
    options |= {"type_k": 0, "type_v": 0, "n_gpu_layers": 0, "model_alias": "nano"}
    command = [python, "-m", "llama_cpp.server", *(str(x) for k, v in options.items() for x in (f"--{k}", v))]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise RuntimeError(f"the server ended: {log.read_text()[-500:]}") from None
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def timed(model: LanguageModel, text: str) -> tuple[nextoken.Signature, float]:
    """A reading, and the least seconds of three after one that is not counted."""
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        signature = nextoken.read(model, text, top=10, progress=False)
        taken.append(time.perf_counter() - start)
    return signature, min(taken[1:])


def compared(url: str, local: Any, text: str, **options: Any) -> dict[str, Any]:
    """Read `text` through the server at `url` and beside it with the model itself."""
    start = time.perf_counter()
    model = ServerModel(url, **options)
    connected = time.perf_counter() - start
    remote, seconds = timed(model, text)
    there, here = remote.column("logprob"), local.column("logprob")
    known = ~np.isnan(there)
    ids = [set(a) & set(b[:10]) for a, b in zip(local.column("top_ids"), remote.column("top_ids"), strict=True)]
    upper = remote.column("entropy_upper")
    inside = (local.column("entropy") >= remote.column("entropy_lower") - 1e-3) & (
        local.column("entropy") <= upper + 1e-3
    )
    dialect = model.dialect
    return {
        "dialect": {"reading": dialect.reading, "prompts": "ids" if dialect.ids else "text", "top": dialect.top},
        "tokens": len(remote),
        "connect_seconds": round(connected, 3),
        "read_seconds": round(seconds, 3),
        "tokens_known": round(float(known.mean()), 4),
        "largest_logprob_difference": float(np.abs(there - here)[known].max()) if known.any() else None,
        "top_10_ids_known": round(float(np.mean([len(both) / 10 for both in ids])), 4),
        "entropy_within_bounds": round(float(inside.mean()), 4),
        "mean_bound_width_nats": round(float(np.mean(upper - remote.column("entropy_lower"))), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llama-python", default=os.environ.get("LLAMA_PYTHON"), help="a Python that has llama-cpp-python[server]"
    )
    parser.add_argument("--characters", type=int, default=2500, help="length of the text, at most one context")
    parser.add_argument("--out", default="bench/results/server.json")
    arguments = parser.parse_args()
    local_model = nextoken.load("nano")
    # Single spaces only: llama.cpp splits runs of spaces and line ends by rules of its own.
    text = " ".join(TEXT.read_text(encoding="utf-8").split())[: arguments.characters]
    local, seconds = timed(local_model, text)
    figures: dict[str, Any] = {"this process": {"tokens": len(local), "read_seconds": round(seconds, 3)}}
    with serving(local_model) as url:
        figures["nextoken service"] = compared(url, local, text)
        figures["nextoken service, top 100"] = compared(url, local, text, top=100)
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = arguments.llama_python or build(Path(folder) / "venv")
            write_gguf(bundled_path("nano"), Path(folder) / "nano.gguf")
            told = subprocess.run(
                [python, "-c", "import importlib.metadata as m; print(m.version('llama-cpp-python'))"],
                capture_output=True,
                text=True,
                check=True,
            )
            with llama_server(python, Path(folder) / "nano.gguf", Path(folder) / "log.txt") as url:
                known = compared(url, local, text, tokenizer=local_model.vocab)
            figures[f"llama-cpp-python {told.stdout.strip()}"] = known | {"gguf": version("gguf")}
        except (subprocess.SubprocessError, OSError, RuntimeError, ImportError, nextoken.NextokenError) as error:
            output = getattr(error, "stderr", None) or ""
            figures["llama-cpp-python"] = {"not_run": f"{type(error).__name__}: {error}", "output": output[-800:]}
    print(json.dumps(figures, indent=2), file=sys.stderr)
    record.write(arguments.out, figures)


if __name__ == "__main__":
    main()

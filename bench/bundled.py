"""How well the bundled models predict texts they have not seen: bits per byte, by `nextoken.read` and its windows.

python bench/bundled.py --json bench/results/bundled.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nextoken
from nextoken.model.loading import bundled_names
from record import write

TEXTS = ("books/frankenstein.txt", "books/the-time-machine.txt", "wikitext2/test.txt", "gsm8k/test.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bytes", type=int, default=200_000, help="read from each text, from its beginning")
    parser.add_argument("--json", default="bench/results/bundled.json")
    arguments = parser.parse_args()
    figures: dict[str, object] = {"bytes_of_each_text": arguments.bytes}
    for name in bundled_names():
        model = nextoken.load(name)
        found = {}
        for text in TEXTS:
            data = (arguments.data / text).read_bytes()[: arguments.bytes]
            signature = nextoken.read(model, data.decode(errors="ignore"), top=0, progress=False)
            found[text] = round(signature.summary()["bits_per_byte"], 3)
            print(name, text, found[text], flush=True)
        figures[name] = found
    write(arguments.json, figures)


if __name__ == "__main__":
    main()

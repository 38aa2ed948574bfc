"""Fuzz one parser in this process until its time is over or something is found.

Usage: python -m benchmarks.fuzzing.one NAME FOLDER CORPUS [libFuzzer's options]
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it

import atheris

# Atheris instruments these imports, to see which of their lines an input reaches.
with atheris.instrument_imports(include=["thanos_deploy", "runtime", "exporters", "gguf"]):
    from benchmarks.fuzzing.parsers import PARSERS

    name, folder, corpus = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    parser = PARSERS[name]
    check, seeds = parser.open(folder)

for number, seed in enumerate(seeds):
    check(seed)  # a well-formed input is no finding
    (corpus / f"seed-{number}").write_bytes(seed)


def _try(content: bytes) -> None:
    with suppress(*parser.refuses):
        check(content)


atheris.Setup([sys.argv[0], str(corpus), *sys.argv[4:]], _try)
atheris.Fuzz()

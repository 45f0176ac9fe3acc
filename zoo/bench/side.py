"""One side of `zoo.bench.against`: a process that loads tokenizers and measures them when told to.

The text of this file runs under the interpreter of another release, so it uses public names alone.
"""

from __future__ import annotations

import inspect
import json
import os
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch

from zoo import hub
from zoo.errors import RegistryError


def load(name: str, items: list[Any]) -> dict[str, Any]:
    """The work of each direction, done once to warm up."""
    model = hub.load(name)
    tokens = model.encode(items)
    # A tokenizer of speech speaks in the voice of what it is given.
    options = {"prompt": items} if "prompt" in inspect.signature(model.decode).parameters else {}
    works = {"encode": lambda: model.encode(items), "decode": lambda: model.decode(tokens, **options)}
    for work in works.values():
        work()
    return works


def serve() -> None:
    """Answer requests, a line of JSON each, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    works: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        if "load" in request:
            torch.set_num_threads(request["threads"])
            # Written by the process that started this one.
            try:
                works = load(request["load"], pickle.loads(Path(request["items"]).read_bytes()))
            except RegistryError:
                answer["unknown"] = True
        else:
            started = time.process_time()
            for _ in range(request["times"]):
                works[request["work"]]()
            answer["cpu"] = time.process_time() - started
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()

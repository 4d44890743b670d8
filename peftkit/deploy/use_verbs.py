"""The command line of a model in use: flags of chat and serve, and what each of them does."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peftkit.deploy.serve.options import Address, Limits, Menu, check_key
from peftkit.errors import InputError

KEY_VARIABLE = "PEFTKIT_API_KEY"
ANYTHING = "a run, a model or adapter folder, a hub id or a packaged backbone"


def add_flags(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the two verbs to a parser; `verb` makes one of a name and a summary."""
    chat = verb("chat", "talk with a model: /reset forgets, /quit ends; lines through a pipe are answered in turn")
    chat.add_argument("reference", metavar="RUN_OR_MODEL", help=ANYTHING)
    chat.add_argument("--system", help="system message; default: the run's own")
    chat.add_argument("--max-new-tokens", type=_positive, default=512)
    chat.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    chat.add_argument("--seed", type=int, default=0)
    usual = Limits()
    serve = verb("serve", "an OpenAI-compatible endpoint, /classify for classifiers, and /metrics")
    serve.add_argument("reference", metavar="RUN_OR_MODEL", help=ANYTHING)
    serve.add_argument("--name", help="what clients call it; default: the last word of its path")
    adapter = "an adapter or run on the same base, by the name that clients call it; may be repeated"
    serve.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help=adapter)
    serve.add_argument("--host", default="127.0.0.1", help="default: this machine alone; elsewhere needs a key")
    serve.add_argument("--port", type=int, default=8000, help="0: any that is free")
    serve.add_argument("--api-key", help=f"what clients have to show; better in the variable {KEY_VARIABLE}")
    engines = ("auto", "transformers", "vllm", "llama-cpp")
    serve.add_argument("--engine", choices=engines, default="auto", help="auto: vLLM where there is a GPU and vLLM")
    serve.add_argument(
        "--max-tokens", type=_positive, help="of a prompt with its answer; default: 4096, or the model's"
    )
    serve.add_argument("--max-new-tokens", type=_positive, default=usual.new_tokens, help="of one answer")
    serve.add_argument("--max-requests", type=_positive, default=usual.requests, help="at a time; more get a 429")
    serve.add_argument("--max-body", type=_positive, default=usual.body_bytes, metavar="BYTES", help="of one request")
    serve.add_argument("--grace", type=_positive, default=60, metavar="SECONDS", help="to finish in, when told to stop")


def run_chat(options: argparse.Namespace) -> int:
    """Talk until the lines end."""
    from peftkit.deploy.chat import COMMANDS, Manner, converse, open_conversation

    if options.temperature < 0:
        raise InputError(f"--temperature {options.temperature}: it cannot be below 0.")
    write = _drop if options.json else _write
    manner = Manner(options.system, options.max_new_tokens, options.temperature, options.seed)
    conversation = open_conversation(options.reference, manner, write=write)
    asks = sys.stdin.isatty() and not options.json
    if asks:
        _tell(COMMANDS)
    said = converse(conversation, _typed() if asks else sys.stdin, write=write, say=_tell)
    if options.json:
        print(json.dumps({"messages": said}))
    return 0


def run_serve(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    address = Address(options.host, options.port, options.api_key or os.environ.get(KEY_VARIABLE) or None)
    check_key(address)
    limits = Limits(options.max_tokens, options.max_new_tokens, options.max_requests, options.max_body)
    menu = _menu(options)
    try:
        from peftkit.deploy.serve.elsewhere import choose
        from peftkit.deploy.serve.server import serve
    except ModuleNotFoundError as fault:
        raise InputError(f"serve needs {fault.name}. Install it: pip install 'peftkit[serve]'.") from fault
    import torch

    command = choose(options.engine, menu, address, limits, cuda=torch.cuda.is_available(), say=_tell)
    if command is not None:
        for note in (*command.notes, f"starting {' '.join(command.arguments[:3])} ..."):
            _tell(note)
        command.replace_process()

    def opened(found: dict[str, Any]) -> None:
        what = "/classify" if found["classifies"] else "/v1"
        told = f"{', '.join(found['models'])} at {found['url']}{what}  ({found['engine']}, {found['dtype']} on "
        line = f"{told}{found['device']}, {found['limit_tokens']} tokens; Ctrl-C ends)"
        print(json.dumps(found) if options.json else line, flush=True)

    serve(menu, address, limits, grace_seconds=options.grace, say=_tell, opened=opened)
    return 0


def _menu(options: argparse.Namespace) -> Menu:
    whole = Path(options.reference)
    name = options.name or (whole.absolute().parent.name if whole.name == "adapter" else whole.absolute().name)
    adapters: dict[str, Path] = {}
    for word in options.adapter:
        called, equals, folder = word.partition("=")
        if not (called and equals and folder):
            raise InputError(f"--adapter {word}: say NAME=DIR, such as --adapter polite=runs/polite.")
        if called in adapters or called == name:
            raise InputError(f"--adapter {word}: {called!r} is the name of another model. Choose another.")
        adapters[called] = Path(folder)
    return Menu(options.reference, name, adapters)


def _typed() -> Iterator[str]:
    """Lines from a terminal, with history and editing where there is readline."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _drop(text: str) -> None:
    """Nothing beside the one JSON document."""


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"chat": run_chat, "serve": run_serve}

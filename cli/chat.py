"""`ws chat`: talk to a running server, streaming. Ctrl-C stops an answer, Ctrl-D leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, TextIO

import typer

from workstation.errors import StartupError

_HELP = "/reset forgets the conversation, /system TEXT sets a system message, /exit leaves; Ctrl-C stops an answer"


def command(
    message: Annotated[str | None, typer.Argument(help="Ask once and exit; stdin does too when it is a pipe.")] = None,
    url: Annotated[str | None, typer.Option(help="Such as http://127.0.0.1:8000; the running server unless given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="WS_API_KEY", show_envvar=True, help="Key of the server.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model; the server's first unless given.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="The model's default unless given.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
) -> None:
    """Chat with a running server."""
    import httpx

    from workstation.cli.servers import bearer, find_server

    base = find_server(url).url
    headers = bearer(api_key)
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10.0, read=None)) as client:
        talk = Conversation(client, model or first_model(client), options)
        if system is not None:
            talk.set_system(system)
        once = message if message is not None else (None if sys.stdin.isatty() else sys.stdin.read())
        if once is not None:
            if not once.strip():
                raise StartupError("the message is empty")
            talk.say(once, sys.stdout)
            return
        print(f"{talk.model} at {base}. {_HELP}.", file=sys.stderr)
        repl(talk)


def first_model(client: Any) -> str:
    """The first name of /v1/models. Raises StartupError when the server does not answer as one."""
    import httpx

    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise StartupError(f"no server answers at {client.base_url}: {error}") from error
    if answer.status_code != 200:
        raise StartupError(f"{client.base_url} answered {answer.status_code}: {error_text(answer.text)}")
    return str(answer.json()["data"][0]["id"])


def error_text(body: str) -> str:
    """The sentence in an OpenAI error body, or the body's start."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]


@dataclass(slots=True)
class Conversation:
    """The turns so far. An answer that was stopped stays in them as far as it came."""

    client: Any
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def set_system(self, text: str) -> None:
        """Begin anew under a system message."""
        self.messages = [{"role": "system", "content": text}]

    def reset(self) -> None:
        """Forget all turns but the system message."""
        self.messages = [turn for turn in self.messages[:1] if turn["role"] == "system"]

    def say(self, text: str, out: TextIO) -> None:
        """Send one turn and write the answer as it arrives, its thoughts to stderr. Ctrl-C ends the request.

        Raises StartupError with the server's sentence; the turn is then taken back.
        """
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        try:
            thinking = False
            for thought, piece in self._stream():
                if thinking and not thought:
                    print("\n", file=sys.stderr, flush=True)
                thinking = thought
                if thought:
                    print(piece, end="", file=sys.stderr, flush=True)
                else:
                    answer.append(piece)
                    out.write(piece)
                    out.flush()
        except KeyboardInterrupt:
            out.write(" [stopped]")
        except StartupError:
            self.messages.pop()
            raise
        out.write("\n")
        out.flush()
        self.messages.append({"role": "assistant", "content": "".join(answer)})

    def _stream(self) -> Iterator[tuple[bool, str]]:
        import httpx

        body = {"model": self.model, "messages": self.messages, "stream": True, **self.options}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise StartupError(f"the server answered {answer.status_code}: {error_text(answer.read().decode())}")
                for line in answer.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[6:]))
        except httpx.HTTPError as error:
            raise StartupError(f"the connection broke: {error}") from error


def _pieces(chunk: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """(whether it is a thought, text) of a chunk. Raises StartupError for a chunk that says the answer broke."""
    if "error" in chunk:
        raise StartupError(f"the server ended the answer: {error_text(json.dumps(chunk))}")
    for choice in chunk.get("choices", []):
        delta = choice.get("delta", {})
        if delta.get("reasoning_content"):
            yield True, delta["reasoning_content"]
        if delta.get("content"):
            yield False, delta["content"]


def repl(talk: Conversation) -> None:
    """Read turns until Ctrl-D or /exit. Errors of one turn are shown, and the conversation goes on."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        name, _, rest = text.partition(" ")
        if not text:
            continue
        if name in ("/exit", "/quit", "/bye"):
            return
        if name == "/reset":
            talk.reset()
        elif name == "/system" and rest.strip():
            talk.set_system(rest.strip())
        elif name.startswith("/"):
            print(_HELP, file=sys.stderr)
        else:
            try:
                talk.say(text, sys.stdout)
            except StartupError as error:
                print(f"ws: {error.message}", file=sys.stderr)

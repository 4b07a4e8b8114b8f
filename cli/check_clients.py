"""What each client's owner has to write where: a `Client` each, its text made from what the server says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from workstation.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Facts:
    """What a configuration needs to know.

    Attributes:
        url: of the server's root.  model: the name it answers to.  window: tokens of prompt and answer together.
        keyed: the server asks for a key; configurations name the variable WS_API_KEY, never the key.
        fills: the model fills in the middle.
    """

    url: str
    model: str
    window: int
    keyed: bool = False
    fills: bool = False

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    @property
    def output(self) -> int:
        """An answer's most tokens: a client subtracts it from the window, so it may not be all of it."""
        return max(256, min(32_000, self.window // 4))

    @property
    def key(self) -> str:
        return "$WS_API_KEY" if self.keyed else "none"

    @property
    def port(self) -> str:
        tail = self.url.rpartition(":")[2]
        return tail if tail.isdigit() else "8000"


@dataclass(frozen=True, slots=True)
class Client:
    """dialects: of chat, responses, messages, fill and props; whose handshakes it needs.  config: (where, what to write)."""

    title: str
    dialects: tuple[str, ...]
    config: Callable[[Facts], list[tuple[str, str]]]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2)


def _exports(values: dict[str, str]) -> str:
    return "\n".join(f"export {name}={value}" for name, value in values.items())


def _codex(facts: Facts) -> list[tuple[str, str]]:
    key = '\nenv_key = "WS_API_KEY"' if facts.keyed else ""
    return [("~/.codex/config.toml", f"""model = "{facts.model}"
model_provider = "ws"
model_context_window = {facts.window}

[model_providers.ws]
name = "ws"
base_url = "{facts.v1}"
wire_api = "responses"{key}""")]


def _claude(facts: Facts) -> list[tuple[str, str]]:
    tiers = ("OPUS", "SONNET", "HAIKU", "FABLE")
    models = ["ANTHROPIC_MODEL", *(f"ANTHROPIC_DEFAULT_{tier}_MODEL" for tier in tiers), "ANTHROPIC_SMALL_FAST_MODEL",
              "CLAUDE_CODE_SUBAGENT_MODEL"]
    return [("shell", _exports({
        "ANTHROPIC_BASE_URL": facts.url, "ANTHROPIC_AUTH_TOKEN": facts.key, **dict.fromkeys(models, facts.model),
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(facts.window), "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(facts.window),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(facts.output), "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    }) + "\nclaude")]


def _continue(facts: Facts) -> list[tuple[str, str]]:
    roles = ["chat", "edit", "apply", *(["autocomplete"] if facts.fills else [])]
    key = "${{ secrets.WS_API_KEY }}" if facts.keyed else "none"
    return [("~/.continue/config.yaml", f"""name: ws
version: 1.0.0
schema: v1
models:
  - name: {facts.model}
    provider: openai
    model: {facts.model}
    apiBase: {facts.v1}
    apiKey: {key}
    roles: [{', '.join(roles)}]
    capabilities: [tool_use]
    defaultCompletionOptions:
      contextLength: {facts.window}
      maxTokens: {facts.output}""")]


def _openwebui(facts: Facts) -> list[tuple[str, str]]:
    image = "-v open-webui:/app/backend/data --name open-webui ghcr.io/open-webui/open-webui:main"
    host = f"docker run -d --network host -e PORT=3000 -e OPENAI_API_BASE_URL={facts.v1} -e OPENAI_API_KEY={facts.key} {image}"
    bridge = (f"ws serve MODEL --port {facts.port} --host 172.17.0.1 --api-key \"$WS_API_KEY\"\n"
              "docker run -d -p 3000:8080 --add-host host.docker.internal:host-gateway "
              f"-e OPENAI_API_BASE_URL=http://host.docker.internal:{facts.port}/v1 -e OPENAI_API_KEY=\"$WS_API_KEY\" {image}")
    return [("shell: the host's network, the server stays on loopback", host),
            ("shell, instead: docker's bridge, the server listens there and asks for a key", bridge)]


def _zed(facts: Facts) -> list[tuple[str, str]]:
    model = {"name": facts.model, "max_tokens": facts.window, "max_output_tokens": facts.output,
             "capabilities": {"tools": True, "images": False, "parallel_tool_calls": True, "prompt_cache_key": False}}
    provider = {"ws": {"api_url": facts.v1, "available_models": [model]}}
    return [("~/.config/zed/settings.json", _pretty({"language_models": {"openai_compatible": provider}})),
            ("shell: Zed wants a key even where the server asks for none",
             'WS_API_KEY="$WS_API_KEY" zed' if facts.keyed else "WS_API_KEY=none zed")]


def _aider(facts: Facts) -> list[tuple[str, str]]:
    costs = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    about = {"max_input_tokens": facts.window, "max_output_tokens": facts.output, **costs, "litellm_provider": "openai",
             "mode": "chat"}
    return [(".aider.model.metadata.json", _pretty({f"openai/{facts.model}": about})),
            ("shell", _exports({"OPENAI_API_BASE": facts.v1, "OPENAI_API_KEY": facts.key})
             + f"\naider --model openai/{facts.model}")]


def _fields(where: str) -> Callable[[Facts], list[tuple[str, str]]]:
    def made(facts: Facts) -> list[tuple[str, str]]:
        return [(where, f"API Provider: OpenAI Compatible\nBase URL: {facts.v1}\nAPI Key: {facts.key}\n"
                        f"Model ID: {facts.model}\nContext Window Size: {facts.window}\n"
                        f"Max Output Tokens: {facts.output}\nSupports Images: off")]

    return made


def _opencode(facts: Facts) -> list[tuple[str, str]]:
    key = "{env:WS_API_KEY}" if facts.keyed else "none"
    model = {"name": facts.model, "tool_call": True, "limit": {"context": facts.window, "output": facts.output}}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "ws", "options": {"baseURL": facts.v1, "apiKey": key},
                "models": {facts.model: model}}
    return [("opencode.json", _pretty({"$schema": "https://opencode.ai/config.json", "model": f"ws/{facts.model}",
                                       "small_model": f"ws/{facts.model}", "provider": {"ws": provider}}))]


def _goose(facts: Facts) -> list[tuple[str, str]]:
    return [("shell", _exports({"GOOSE_PROVIDER": "openai", "GOOSE_MODEL": facts.model, "OPENAI_HOST": facts.url,
                                "OPENAI_API_KEY": facts.key, "GOOSE_CONTEXT_LIMIT": str(facts.window)}) + "\ngoose session")]


def _python(text: str) -> Callable[[Facts], list[tuple[str, str]]]:
    """A snippet in which URL, V1, MODEL, KEY and WINDOW stand for the facts."""

    def made(facts: Facts) -> list[tuple[str, str]]:
        key = 'os.environ["WS_API_KEY"]' if facts.keyed else '"none"'
        words = {"V1": f'"{facts.v1}"', "URL": f'"{facts.url}"', "MODEL": f'"{facts.model}"', "KEY": key,
                 "WINDOW": str(facts.window), "NAME": facts.model}
        found = text
        for word, value in words.items():
            found = found.replace(f"<{word}>", value)
        return [("Python", ("import os\n\n" if facts.keyed else "") + found)]

    return made


CLIENTS: dict[str, Client] = {
    "codex": Client("Codex", ("responses",), _codex),
    "claude": Client("Claude Code", ("messages",), _claude),
    "continue": Client("Continue", ("chat", "fill"), _continue),
    "openwebui": Client("Open WebUI", ("chat",), _openwebui),
    "zed": Client("Zed", ("chat", "props"), _zed),
    "aider": Client("aider", ("chat",), _aider),
    "cline": Client("Cline", ("chat",), _fields("Cline's settings")),
    "roo": Client("Roo Code", ("chat",), _fields("Roo Code's settings")),
    "opencode": Client("opencode", ("chat",), _opencode),
    "goose": Client("Goose", ("chat",), _goose),
    "openai": Client("OpenAI's Python SDK", ("chat", "responses"), _python(
        "from openai import OpenAI\n\nclient = OpenAI(base_url=<V1>, api_key=<KEY>)  # model=<MODEL>")),
    "anthropic": Client("Anthropic's Python SDK", ("messages",), _python(
        "from anthropic import Anthropic\n\nclient = Anthropic(base_url=<URL>, api_key=<KEY>)  # model=<MODEL>")),
    "langchain": Client("LangChain", ("chat",), _python(
        "from langchain_openai import ChatOpenAI, OpenAIEmbeddings\n\n"
        "model = ChatOpenAI(base_url=<V1>, api_key=<KEY>, model=<MODEL>, stream_usage=True)\n"
        "embeddings = OpenAIEmbeddings(base_url=<V1>, api_key=<KEY>, model=<MODEL>, check_embedding_ctx_length=False)")),
    "litellm": Client("LiteLLM", ("chat",), _python(
        'import litellm\n\nlitellm.completion("hosted_vllm/<NAME>", api_base=<V1>, api_key=<KEY>, messages=[])')),
    "llamaindex": Client("LlamaIndex", ("chat",), _python(
        "from llama_index.llms.openai_like import OpenAILike\n\n"
        "model = OpenAILike(api_base=<V1>, api_key=<KEY>, model=<MODEL>, is_chat_model=True,\n"
        "                   is_function_calling_model=True, context_window=<WINDOW>)")),
}  # fmt: skip
ALIASES = {"claude-code": "claude", "open-webui": "openwebui", "roo-code": "roo"}


def find_client(name: str) -> tuple[str, Client]:
    """By name, whatever its case. Raises ConfigError that lists the names."""
    key = ALIASES.get(name.lower(), name.lower())
    if key == "cursor":
        raise ConfigError("Cursor sends its requests from its makers' servers, which cannot reach this machine", param="client")
    if key not in CLIENTS:
        raise ConfigError(f"client must be one of {', '.join(CLIENTS)}, got {name[:40]!r}", param="client")
    return key, CLIENTS[key]

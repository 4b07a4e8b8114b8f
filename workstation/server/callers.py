"""What a request is called on the dashboard when it does not name itself: by its User-Agent, else by its peer's port."""

from __future__ import annotations

from starlette.requests import Request

# Part of a User-Agent → a short name; the first that fits. An application stands before the library it is made with.
KNOWN_AGENTS = (
    ("claude-cli", "claude-code"), ("claude-code", "claude-code"), ("opencode", "opencode"), ("codex", "codex"),
    ("cursor", "cursor"), ("continue", "continue"), ("cline", "cline"), ("roo-code", "roo-code"), ("aider", "aider"),
    ("open-webui", "open-webui"), ("openwebui", "open-webui"), ("librechat", "librechat"), ("zed/", "zed"),
    ("jetbrains", "jetbrains"), ("vscode", "vscode"), ("litellm", "litellm"), ("langchain", "langchain"),
    ("openai/python", "openai-python"), ("openai/js", "openai-js"), ("anthropic/python", "anthropic-python"),
    ("anthropic/js", "anthropic-js"), ("curl/", "curl"), ("python-httpx", "httpx"), ("python-requests", "requests"),
    ("aiohttp", "aiohttp"), ("node", "node"), ("mozilla/", "browser"),
)  # fmt: skip


def own_name(request: Request) -> str:
    """What `X-Client` says, "" without it. Headers are bytes, which Starlette reads as Latin-1 and clients write as UTF-8."""
    return request.headers.get("x-client", "").encode("latin-1").decode(errors="replace")


def guessed_name(request: Request) -> str:
    """Such as claude-code, or :54321."""
    agent = request.headers.get("user-agent", "").lower()
    found = next((name for part, name in KNOWN_AGENTS if part in agent), None)
    return found or (f":{request.client.port}" if request.client else "")


def history_key(request: Request, label: str) -> str:
    """Whose earlier prompts a request is compared with: connections come and go, so a port counts as its host."""
    if label.startswith(":") and request.client:
        return request.client.host
    return label


def route_name(path: str) -> str:
    """Such as chat, completions, messages, responses."""
    return path.removeprefix("/v1/").removesuffix("/completions")[:16]

"""Which server a command talks to: the one named by --url, or the one that runs on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.errors import ConfigError, StartupError
from workstation.runtime import RunningServer, servers


@dataclass(frozen=True, slots=True)
class Target:
    """`url` without a trailing slash or /v1; `server` when it was found on this machine."""

    url: str
    server: RunningServer | None = None


def find_server(url: str | None, *, loading: bool = False) -> Target:
    """The server to use; one that still loads only where `loading` says so.

    Raises ConfigError for a malformed url or several servers, StartupError when none runs or answers yet.
    """
    if url is not None:
        return Target(root_of(url))
    known_here = servers()
    found = [server for server in known_here if loading or server.state != "loading"]
    if known_here and not found:
        first = known_here[0]
        raise StartupError(f"{first.model} at {first.base_url} is still loading; `ws ps` tells how far it is")
    if not found:
        raise StartupError("no server runs here; start one with `ws serve demo`, or give --url")
    if len(found) > 1:
        known = ", ".join(f"{server.base_url} ({server.model})" for server in found)
        raise ConfigError(f"several servers run here; name one by its URL: {known}", param="url")
    return Target(root_of(found[0].base_url), found[0])


def root_of(url: str) -> str:
    """The server's root: http://host:port, whatever of /v1 was typed."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must begin with http:// or https://, got {url!r}", param="url")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def bearer(api_key: str | None) -> dict[str, str]:
    """The Authorization header; of several keys separated by commas, as a server takes them, the first."""
    return {"Authorization": f"Bearer {api_key.split(',')[0].strip()}"} if api_key else {}

"""What the server is told at start, and what it serves. Frozen; decided once."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from workstation.parsers.detect import Formats
from workstation.pooling_config import PoolingConfig
from workstation.text.tokenizer import Tokenizer

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the HTTP side behaves.

    Attributes:
        api_keys: any of these opens every route; empty means no key is asked for (only sensible on loopback).
        allowed_hosts: further values of the Host header accepted on a loopback bind (names without port).
        allowed_origins: web origins that may call from a browser (CORS); none by default.
        priority_scheduling: the engine runs the priority policy, so requests may carry `priority`.
        max_body_bytes, max_json_depth, max_header_bytes: limits of one HTTP request.
        body_timeout, header_timeout: seconds a client may take to send them.
        max_sequences_per_request: n × prompts of one request.
        keep_alive_seconds: a stream silent for so long gets an SSE comment.
        first_byte_seconds: how long a stream may wait for its first token before its headers are sent anyway.
        write_timeout: seconds a client may stall before its stream is dropped.
        drain_seconds: how long SIGTERM waits for requests in flight.
        max_connections: open connections; further ones get 503.
        map_claude_models: /v1/messages answers to every `claude-…` model id.
        request_metrics: chat and completions carry vLLM's `metrics` object.
        metrics_prefix: "ws" or "vllm", of what /metrics answers.
        show_text: dashboards see the ends of prompts and answers.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    priority_scheduling: bool = False
    max_body_bytes: int = 32 * MIB
    max_json_depth: int = 64
    max_header_bytes: int = 64 * 1024
    body_timeout: float = 60.0
    header_timeout: float = 30.0
    max_sequences_per_request: int = 256
    keep_alive_seconds: float = 5.0
    first_byte_seconds: float = 1.0
    write_timeout: float = 60.0
    drain_seconds: float = 30.0
    max_connections: int = 4096
    tokenizer_threads: int = 2
    access_log: bool = False
    map_claude_models: bool = True
    request_metrics: bool = False
    metrics_prefix: Literal["ws", "vllm"] = "ws"
    show_text: bool = False

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether a bind address is reachable from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model of a server.

    Attributes:
        names: accepted in the `model` field; the first is the one shown.
        default_sampling: SamplingParams fields used where a request is silent (models.toml over generation_config.json).
        eos_token_ids: end a sample unless the request says ignore_eos.
        window: tokens of prompt + output; 0 takes the ready engine's max_model_len.
        created: Unix seconds.  root: the folder or hub id, as shown in /v1/models.
        formats: how the model writes calls and thoughts.  folder: where it lies, for the process that tries grammars.
        formats: how the model writes calls and thoughts.  pooling: how embeddings are made of its hidden states.
        generates: False for a model without a head, which makes embeddings only.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    window: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    root: str = ""
    formats: Formats = field(default_factory=Formats)
    folder: str = ""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    generates: bool = True

    @property
    def name(self) -> str:
        return self.names[0]

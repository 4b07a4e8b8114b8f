"""What clients ask to find out whom they talk to: /props as llama.cpp has it, and paths that only want a quiet answer."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from workstation import __version__
from workstation.errors import InvalidRequestError
from workstation.server import wire
from workstation.server.fim import fim_tokens
from workstation.server.prepare import Service


class Probes:
    """Answers that need no engine."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def props(self, request: Request) -> Response:
        """The window, the template and what it can do, where editors look for them."""
        service = self._service
        template, formats = service.model.tokenizer.chat_template, service.model.formats
        tools = formats.calls and formats.takes_tools
        return _json({
            "default_generation_settings": {"n_ctx": service.window, "params": dict(service.model.default_sampling)},
            "total_slots": service.engine.info.max_num_seqs, "model_alias": service.model.name,
            "model_path": service.model.root or service.model.name, "modalities": {"vision": False, "audio": False},
            "chat_template": template.source if template is not None else "",
            "chat_template_caps": {"supports_tools": tools, "supports_tool_calls": tools, "supports_parallel_tool_calls": tools,
                                   "supports_system_role": True},
            "bos_token": service.model.tokenizer.bos_token or "", "eos_token": service.model.tokenizer.eos_token or "",
            "build_info": f"ws-{__version__}", "tool_call_parser": formats.tool_name, "reasoning_parser": formats.think_name,
            "fill_in_the_middle": self._fills(),
        })

    def _fills(self) -> bool:
        try:
            fim_tokens(self._service.model.tokenizer)
        except InvalidRequestError:
            return False
        return True

    async def hello(self, request: Request) -> Response:
        return _json({"name": "ws", "version": __version__})

    async def swallow(self, request: Request) -> Response:
        """Telemetry of clients that know no other server: taken, and thrown away."""
        return _json({})


def _json(value: Any) -> Response:
    return Response(wire.encode(value), media_type="application/json")

"""/tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from workstation.errors import InvalidRequestError
from workstation.server.chat import tokenize_dialogue
from workstation.server.dialogue import dialogue_ids
from workstation.server.prepare import Service
from workstation.server.schemas import DetokenizeRequest, TokenizeRequest

_CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """{count, max_model_len, tokens, token_strs}: ids of a prompt, or of messages through the chat template."""
    service.check_model(body.model)
    tokenizer = service.model.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("send either prompt or messages", param="prompt")
    if body.messages is not None:
        ids = dialogue_ids(service, tokenize_dialogue(service, body))
    else:
        used = [name for name in _CHAT_ONLY if getattr(body, name) is not None]
        if used:
            raise InvalidRequestError(f"{used[0]} needs messages", param=used[0])
        service.check_text(len(body.prompt or ""), "prompt")
        ids = tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    strings = [tokenizer.token_string(index) for index in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.window, "tokens": ids, "token_strs": strings}


def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """{prompt}: the text of ids, control tokens included."""
    service.check_model(body.model)
    limit = max(service.window, 65536)
    if len(body.tokens) > limit:
        raise InvalidRequestError(f"tokens holds {len(body.tokens)} ids; the limit is {limit}", param="tokens")
    return {"prompt": service.model.tokenizer.decode(service.check_ids(body.tokens, "tokens"))}

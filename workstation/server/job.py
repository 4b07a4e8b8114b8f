"""A validated HTTP request, ready for the engine."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from workstation.engine.request import EngineRequest
from workstation.server.constraint import Constraint
from workstation.server.parsing import Parsing


class Divergence(Struct):
    """Where a prompt leaves the earlier prompt of the same client that it shares most with; everything before is shared.

    Attributes:
        token: index of the first token that differs.  message: index of the first message that does; None when none does
            (other tools or template variables) and in completions.
        earlier_tokens: length of the earlier prompt.  prompt: which of the request's prompts.
    """

    token: int
    message: int | None
    earlier_tokens: int
    prompt: int = 0

    def header(self) -> str:
        """The value of `x-ws-prefix`."""
        message = "" if self.message is None else f"message={self.message}; "
        return f"diverged; {message}token={self.token}; earlier-tokens={self.earlier_tokens}; prompt={self.prompt}"


@dataclass(slots=True)
class Job:
    """One validated HTTP request on its way to the engine.

    Attributes:
        public_id: the `id` of the answer.  requests: one a prompt.  samples: choices a prompt.
        stream, usage_at_end, usage_always, timings_always, request_metrics: how to answer.
        logprobs: whether output logprobs are shown.
        messages: a digest a chat message.  divergence: why less of the prompt was cached than could have been, when so.
        hide_output: OpenAI's max_tokens=0 with echo: one token is computed and none is shown.
        constraint: the grammar of its answers, which is tried before the engine gets it.
        parsing: how calls and thoughts are read out of the text; None leaves it as it is.
    """

    public_id: str
    model: str
    created: int
    requests: list[EngineRequest]
    samples: int
    stream: bool = False
    usage_at_end: bool = False
    usage_always: bool = False
    logprobs: bool = False
    echo: bool = False
    echo_logprobs: bool = False
    prompt_logprobs: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    hide_output: bool = False
    timings_always: bool = False
    request_metrics: bool = False
    messages: tuple[bytes, ...] = ()
    divergence: Divergence | None = None
    parsing: Parsing | None = None
    constraint: Constraint | None = None

    @property
    def varies_in_text_alone(self) -> bool:
        """Whether a stream's chunks between the first and the last of a choice differ in their text alone."""
        return not (self.logprobs or self.return_token_ids or self.usage_always or self.timings_always or self.hide_output)

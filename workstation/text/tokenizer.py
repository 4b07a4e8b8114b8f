"""A model folder's tokenizer: encode, decode, chat prompts. Reads tokenizer.json; needs neither torch nor transformers."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.text.chat_template import RESERVED_NAMES, ChatTemplate
from workstation.text.detokenizer import Detokenizer
from workstation.text.folder import TokenizerFiles, read_folder
from workstation.text.pieces import DecoderSpec, TokenTable
from workstation.text.sealed import SealedEncoder
from workstation.text.untrusted import Guard


class Tokenizer:
    """Text ↔ token ids, and messages → token ids.

    `encode` reads control strings in the text as tokens (a raw prompt is the caller's own); `encode_chat` reads only those the
    template wrote. All methods may be called from several threads.

    Attributes:
        bos_token, eos_token: the strings, or None.  bos_token_id, eos_token_id: their ids, or None.
        vocab_size: ids the tokenizer knows (the model's logits may be wider).
        special_ids: ids skipped by skip_special_tokens.  control_ids: string → id of added tokens that are special or look like
            a tag; no grammar takes them for text.  chat_template: None when the folder has none.
    """

    def __init__(self, files: TokenizerFiles, *, chat_template: str | None = None) -> None:
        self._backend = files.backend
        self.special_tokens: dict[str, str] = files.named_tokens
        self.bos_token = files.named_tokens.get("bos_token")
        self.eos_token = files.named_tokens.get("eos_token")
        self.bos_token_id = self.token_id(self.bos_token)
        self.eos_token_id = self.token_id(self.eos_token)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.control_ids = {token.content: index for index, token in added.items()
                            if token.special or (token.content.startswith("<") and token.content.endswith(">"))}
        decoder = self._backend.decoder
        spec = DecoderSpec(json.loads(decoder.__getstate__()) if decoder is not None else None)
        self.table = TokenTable(self._backend, spec, self.special_ids)
        source = chat_template if chat_template is not None else files.chat_template
        self.chat_template = ChatTemplate(source) if source else None
        self._guard = Guard([token.content for token in added.values() if token.special],
                            [token.content for token in added.values() if not token.special],
                            self._normalizer(added))
        self._sealed = SealedEncoder(self._backend, self.special_ids)
        self._lock = threading.Lock()

    @classmethod
    def from_folder(cls, path: str | Path, *, chat_template: str | None = None) -> Tokenizer:
        """Load a folder; `chat_template` (Jinja text) replaces the folder's own.

        Raises ModelFolderError when files are missing or broken. Only a folder without tokenizer.json imports transformers.
        """
        return cls(read_folder(Path(path)), chat_template=chat_template)

    def _normalizer(self, added: dict[int, Any]) -> Any:
        normalizer = self._backend.normalizer
        if normalizer is None or not any(token.normalized for token in added.values()):
            return None
        return normalizer.normalize_str

    def token_id(self, token: str | None) -> int | None:
        found: int | None = self._backend.token_to_id(token) if token else None
        return found

    def token_string(self, token_id: int) -> str:
        """The vocabulary's own string for an id ("" when unknown)."""
        return self.table.piece(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for, possibly part of a character."""
        return self.table.bytes_of(token_id)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, control strings in it read as tokens, bos/eos added as the folder says. Raises InvalidRequestError."""
        _check_unicode(text)
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids; ids the tokenizer does not know add nothing."""
        text: str = self._backend.decode([index for index in token_ids if 0 <= index < 2**32],
                                         skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, **options: Any) -> Detokenizer:
        """An incremental decoder; options are Detokenizer's."""
        return Detokenizer(self.table, **options)

    def render_chat(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None,
                    add_generation_prompt: bool = True, continue_final_message: bool = False,
                    template_kwargs: dict[str, Any] | None = None) -> str:
        """The prompt as text, for people and tests; `encode_chat` gives the ids."""
        text, _ = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs, None)
        return text

    def encode_chat(self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None,
                    add_generation_prompt: bool = True, continue_final_message: bool = False,
                    template_kwargs: dict[str, Any] | None = None, add_special_tokens: bool = False) -> list[int]:
        """Render and encode; control strings inside messages, tools and variables are ordinary text.

        Raises InvalidRequestError (param "messages") when there is no template or it refuses.
        """
        marks = self._guard.pick_mark([messages, tools, template_kwargs])
        if len(marks) < 3:
            raise InvalidRequestError("messages holds too many kinds of Unicode noncharacters", param="messages")
        text, broken = self._render(messages, tools, add_generation_prompt, continue_final_message, template_kwargs, marks)
        if not broken:
            return self.encode(text, add_special_tokens=add_special_tokens)
        _check_unicode(text)
        with self._lock:
            encoder = self._sealed.prepared()
        ids = encoder.encode(text, mark=marks[0])
        head, tail = self._frame() if add_special_tokens else ([], [])
        return [*head, *ids, *tail]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts before and after a text."""
        bare = self.encode("a", add_special_tokens=False)
        full = self.encode("a")
        start = next(start for start in range(len(full)) if full[start:start + len(bare)] == bare)
        return full[:start], full[start + len(bare):]

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool,
                continue_final_message: bool, template_kwargs: dict[str, Any] | None, marks: list[str] | None,
                ) -> tuple[str, bool]:
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError("continue_final_message and add_generation_prompt cannot both be true",
                                      param="continue_final_message")
        variables: dict[str, Any] = dict(template_kwargs or {})
        if reserved := RESERVED_NAMES & variables.keys():
            raise InvalidRequestError(f"chat_template_kwargs may not set {sorted(reserved)[0]}", param="chat_template_kwargs")
        chosen = marks or self._guard.pick_mark([messages, tools, variables])
        broken = False
        if marks is not None:
            messages, broken_messages = self._guard.break_messages(messages, chosen[0])
            tools, broken_tools = self._guard.break_value(tools, chosen[0])
            variables, broken_variables = self._guard.break_value(variables, chosen[0])
            broken = broken_messages or broken_tools or broken_variables
        if continue_final_message:
            messages = _with_open_end(messages, chosen[1])
        text = self.chat_template.render(messages, tools=tools or None, add_generation_prompt=add_generation_prompt,
                                         **{**self.special_tokens, **variables})
        if continue_final_message:
            text = _cut_open_end(text, chosen[1])
        return text, broken

    def bad_word_ids(self, words: list[str]) -> list[list[int]]:
        """Token sequences that spell each word, at the start of a text and after a space (vLLM's reading of bad_words)."""
        found: list[list[int]] = []
        for word in words:
            bare = word.lstrip() or word
            for text in (bare, " " + bare):
                ids = self.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found


def _with_open_end(messages: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    last = messages[-1] if messages else {}
    if not isinstance(last.get("content"), str):
        raise InvalidRequestError("continue_final_message needs a last message with text content",
                                  param="continue_final_message")
    return [*messages[:-1], {**last, "content": last["content"] + mark}]


def _cut_open_end(text: str, mark: str) -> str:
    head, found, _ = text.rpartition(mark)
    if not found:
        raise InvalidRequestError("the chat template dropped the final message, so it cannot be continued",
                                  param="continue_final_message")
    return head


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"the text holds a lone surrogate at character {error.start}, which is not Unicode",
                                  param="prompt") from None



"""What a request says its answer must look like, in each dialect's words → one StructuredOutputsParams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workstation.errors import InvalidRequestError
from workstation.grammar.params import KINDS, StructuredOutputsParams
from workstation.server.body import show
from workstation.server.schemas import SamplingRequest

GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_BACKENDS = ("auto", "guidance", "llguidance")
_SCHEMA_KEYS = frozenset({"name", "description", "schema", "strict"})
_OPTIONS = frozenset({"disable_any_whitespace", "disable_additional_properties", "whitespace_pattern", "disable_fallback"})


@dataclass(frozen=True, slots=True)
class Output:
    """What the text of an answer must be, and the field that says so."""

    params: StructuredOutputsParams
    where: str


def requested_output(body: SamplingRequest) -> Output | None:
    """The `response_format`, `structured_outputs` or `guided_…` of OpenAI's dialects. Raises InvalidRequestError."""
    _check_backend(body.guided_decoding_backend)
    given = (_response_format(body.response_format), _structured(body.structured_outputs))
    found = [item for item in given if item is not None]
    found += [_guided(name, getattr(body, name), body.guided_whitespace_pattern) for name in GUIDED
              if getattr(body, name) is not None]
    if len(found) > 1:
        raise InvalidRequestError(f"{found[1].where} cannot be combined with {found[0].where}", param=found[1].where)
    if body.guided_whitespace_pattern is not None and body.guided_json is None:
        raise InvalidRequestError("guided_whitespace_pattern is only used with guided_json", param="guided_whitespace_pattern")
    return found[0] if found else None


def output_format(given: Any, where: str) -> Output | None:
    """A format whose schema stands beside its type: `text.format` of responses, `output_format` of messages."""
    if given is None:
        return None
    _check_object(given, where)
    kind = given.get("type")
    if kind == "text":
        _check_keys(given, {"type"}, where)
        return None
    if kind == "json_object":
        _check_keys(given, {"type"}, where)
        return Output(StructuredOutputsParams(json_object=True), where)
    if kind != "json_schema":
        raise InvalidRequestError(f"{where}.type must be text, json_object or json_schema, got {show(kind)}",
                                  param=f"{where}.type")
    _check_keys(given, _SCHEMA_KEYS | {"type"}, where)
    return _schema(given, where)


def _response_format(given: dict[str, Any] | None) -> Output | None:
    where = "response_format"
    kind = given.get("type") if given is not None else "text"
    if given is None or kind == "text":
        return None
    if kind == "json_schema":
        _check_keys(given, {"type", "json_schema"}, where)
        inner: Any = given.get("json_schema")
        _check_object(inner, f"{where}.json_schema")
        _check_keys(inner, _SCHEMA_KEYS, f"{where}.json_schema")
        return _schema(inner, f"{where}.json_schema")
    if kind == "json_object":
        _check_keys(given, {"type", "schema"}, where)
        if given.get("schema") is not None:  # llama.cpp's way
            return _schema(given, where)
        return Output(StructuredOutputsParams(json_object=True), where)
    if kind == "structural_tag":
        return Output(StructuredOutputsParams(structural_tag=given), where)
    raise InvalidRequestError(f"{where}.type must be text, json_object, json_schema or structural_tag, got {show(kind)}",
                              param=f"{where}.type")


def _structured(given: dict[str, Any] | None) -> Output | None:
    if given is None:
        return None
    where = "structured_outputs"
    _check_keys(given, {*KINDS, *_OPTIONS}, where)
    values = {key: value for key, value in given.items() if key != "disable_fallback" and value is not None}
    try:
        params = StructuredOutputsParams(**values)
    except InvalidRequestError as error:
        raise _placed(error, where) from None
    return Output(params, f"{where}.{params.kind}")


def _guided(name: str, value: Any, pattern: str | None) -> Output:
    kind = name.removeprefix("guided_")
    try:
        return Output(StructuredOutputsParams(**{kind: value}, whitespace_pattern=pattern if kind == "json" else None), name)
    except InvalidRequestError as error:
        if error.param == kind:
            raise InvalidRequestError(error.message.replace(kind, name, 1), param=name) from None
        raise InvalidRequestError(f"{name} must ask for something, got {show(value)}", param=name) from None


def _placed(error: InvalidRequestError, where: str) -> InvalidRequestError:
    """The error of a field inside `where`."""
    if error.param and error.param != where:
        error.message, error.param = f"{where}.{error.message}", f"{where}.{error.param}"
    return error


def _schema(given: dict[str, Any], where: str) -> Output:
    """{name, description, schema, strict}: the schema is enforced, strict or not."""
    name, schema = given.get("name"), given.get("schema")
    for key, kind in (("name", str), ("description", str), ("strict", bool)):
        if given.get(key) is not None and not isinstance(given[key], kind):
            raise InvalidRequestError(f"{where}.{key} must be {'a string' if kind is str else 'true or false'}, got "
                                      f"{show(given[key])}", param=f"{where}.{key}")
    if name is not None and not 1 <= len(name) <= 64:
        raise InvalidRequestError(f"{where}.name must be 1 to 64 characters long, got {len(name)}", param=f"{where}.name")
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"{where}.schema must be a JSON schema, an object, got {show(schema)}",
                                  param=f"{where}.schema")
    return Output(StructuredOutputsParams(json=schema), f"{where}.schema")


def _check_backend(name: str | None) -> None:
    if name is not None and name not in _BACKENDS:
        raise InvalidRequestError(f"guided_decoding_backend must be one of {', '.join(_BACKENDS)}, got {show(name)}",
                                  param="guided_decoding_backend")


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object, got {show(value)}", param=where)


def _check_keys(value: dict[str, Any], known: set[str] | frozenset[str], where: str) -> None:
    if unknown := value.keys() - known:
        place = f"{where}.{min(unknown)[:64]}"
        raise InvalidRequestError(f"{place}: unknown field", param=place)

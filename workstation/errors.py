"""Every error `ws` raises on purpose, as one tree.

WorkstationError
├── InvalidRequestError      400  a field of a request is wrong; names field, value and limit
│   └── ContextLengthError   400  prompt + output do not fit the window
├── ModelNotFoundError       404  the request (or the command line) names an unknown model
├── AuthenticationError      401
├── OverloadedError          503  the queue is full; carries retry_after seconds
├── EngineDeadError          503  the engine process died with this request in flight
├── EngineError              500  one request failed inside the engine (for example non-finite logits)
└── StartupError             exit code 1; the server never opens its port
    ├── ConfigError          exit code 2: a flag, environment variable or models.toml entry
    ├── ModelFolderError     the folder is missing, incomplete, malformed or unsafe
    ├── DeviceError          no usable GPU, or the driver is too old
    ├── OutOfMemoryError     weights or KV cache do not fit; names what would
    └── PortInUseError

Each class carries `http_status` and `code` (OpenAI's error shape) and `exit_code` (the command line).
"""

from __future__ import annotations


class WorkstationError(Exception):
    """Base of all deliberate errors. `message` is one or two sentences for a person; `param` names the field."""

    http_status = 500
    code = "internal_error"
    kind = "server_error"
    exit_code = 1

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(WorkstationError):
    http_status = 400
    code = "invalid_value"
    kind = "invalid_request_error"
    exit_code = 2


class ContextLengthError(InvalidRequestError):
    """`tokens` of the prompt against the `limit` of the window, for dialects that say it in words of their own."""

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None, tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens
        self.limit = limit


class ModelNotFoundError(WorkstationError):
    http_status = 404
    code = "model_not_found"
    kind = "invalid_request_error"
    exit_code = 2


class AuthenticationError(WorkstationError):
    http_status = 401
    code = "invalid_api_key"
    kind = "invalid_request_error"


class OverloadedError(WorkstationError):
    http_status = 503
    code = "overloaded"

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(WorkstationError):
    http_status = 503
    code = "engine_dead"


class EngineError(WorkstationError):
    http_status = 500
    code = "engine_error"


class StartupError(WorkstationError):
    code = "startup_failed"


class ConfigError(StartupError):
    code = "bad_config"
    exit_code = 2


class ModelFolderError(StartupError):
    code = "bad_model_folder"


class DeviceError(StartupError):
    code = "no_device"


class OutOfMemoryError(StartupError):
    code = "out_of_memory"


class PortInUseError(StartupError):
    code = "port_in_use"

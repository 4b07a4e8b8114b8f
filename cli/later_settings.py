"""vLLM's flags whose feature has not landed: one value works, any other is refused with the reason."""

from __future__ import annotations

from typing import Any

from workstation.settings import Kind, Setting


def _later(name: str, kind: Kind, works: Any, why: str, *short: str) -> Setting:
    return Setting(name, kind, works, "", short, only=(works,), why=why)


_ONE_GPU = "this version runs one engine on one GPU"
_LORA = "adapters have not landed"
_SPECULATIVE = "speculative decoding has not landed"
_FOLDER = "the tokenizer comes from the model's folder"
_GRAPHS = "graphs are captured for a fixed ladder of batch sizes and nothing is compiled; --enforce-eager turns them off"
_TLS = "put a TLS proxy in front"
_OFFLOAD = "the KV cache lives on the device"
_LOGGING = "requests are not logged; /metrics has the figures"

LATER_SETTINGS: tuple[Setting, ...] = (
    _later("block_size", "int", 16, "blocks hold 16 tokens"),
    _later("quantization_config", "text", None, "a checkpoint's format is read from its folder, and the forms have no options"),
    _later("tensor_parallel_size", "int", 1, _ONE_GPU, "-tp"),
    _later("pipeline_parallel_size", "int", 1, _ONE_GPU, "-pp"),
    _later("data_parallel_size", "int", 1, _ONE_GPU, "-dp"),
    _later("enable_expert_parallel", "bool", False, _ONE_GPU, "-ep"),
    _later("distributed_executor_backend", "text", None, _ONE_GPU),
    _later("tokenizer", "text", None, _FOLDER),
    _later("tokenizer_mode", "text", "auto", _FOLDER),
    _later("tokenizer_revision", "text", None, _FOLDER),
    _later("code_revision", "text", None, "ws never runs code from a model folder"),
    _later("trust_remote_code", "bool", False, "ws never runs code from a model folder"),
    _later("model_impl", "text", "auto", "there is one implementation of each architecture"),
    _later("hf_overrides", "text", None, "the shape is read from config.json; change it there"),
    _later("cpu_offload_gb", "float", 0.0, "all weights live on the device"),
    _later("kv_offloading_size", "float", None, _OFFLOAD),
    _later("kv_offloading_backend", "text", None, _OFFLOAD),
    _later("prefix_caching_hash_algo", "text", None, "a prefix is found by its hash and compared token by token"),
    _later("disable_sliding_window", "bool", False, "a sliding window is served as the model defines it"),
    _later("long_prefill_token_threshold", "int", 0, "prompts share a step's token budget in the order of the queue"),
    _later("max_num_queued_tokens", "int", None, "the queue is limited by --max-num-queued-reqs"),
    _later("watermark", "float", 0.0, "no blocks are held back"),
    _later("stream_interval", "int", 1, "tokens are sent as they come"),
    _later("attention_backend", "text", None, "there is one attention kernel a device"),
    _later("performance_mode", "text", "balanced", "there is one mode"),
    _later("compilation_config", "text", None, _GRAPHS, "-O"),
    _later("cudagraph_capture_sizes", "list", (), _GRAPHS),
    _later("max_cudagraph_capture_size", "int", None, _GRAPHS),
    _later("max_logprobs", "int", 20, "20 is the limit"),
    _later("logprobs_mode", "text", "raw_logprobs", "logprobs are the model's own"),
    _later("logits_processors", "list", (), "ws runs no code from outside"),
    _later("structured_outputs_config", "text", None, "structured output has no settings"),
    _later("enable_lora", "bool", False, _LORA),
    _later("lora_modules", "list", (), _LORA),
    _later("max_loras", "int", None, _LORA),
    _later("max_lora_rank", "int", None, _LORA),
    _later("speculative_config", "text", None, _SPECULATIVE),
    _later("spec_method", "text", None, _SPECULATIVE),
    _later("spec_model", "text", None, _SPECULATIVE),
    _later("spec_tokens", "int", None, _SPECULATIVE),
    _later("response_role", "text", "assistant", "answers have the role assistant"),
    _later("chat_template_content_format", "text", "auto", "text parts are joined"),
    _later("default_chat_template_kwargs", "text", None, "send chat_template_kwargs with the request"),
    _later("limit_mm_per_prompt", "text", None, "images, audio and video have not landed"),
    _later("enable_sleep_mode", "bool", False, "a server that is not needed is stopped with `ws stop`"),
    _later("otlp_traces_endpoint", "text", None, "tracing has not landed"),
    _later("kv_cache_metrics", "bool", False, "block lifetimes are not measured"),
    _later("enable_log_requests", "bool", False, _LOGGING),
    _later("uvicorn_log_level", "text", None, "the HTTP server tells errors; --access-log adds a line a request"),
    _later("allowed_methods", "list", (), "cross-origin calls may use GET and POST"),
    _later("allowed_headers", "list", (), "cross-origin calls may send the headers clients need"),
    _later("root_path", "text", None, "the API stands at the root"),
    _later("uds", "text", None, "the API listens on TCP"),
    _later("ssl_keyfile", "text", None, _TLS),
    _later("ssl_certfile", "text", None, _TLS),
    _later("ssl_ca_certs", "text", None, _TLS),
)

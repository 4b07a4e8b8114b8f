"""The settings of `ws serve`: vLLM's names and meanings. What has not landed is refused with a sentence, never ignored."""

from __future__ import annotations

from dataclasses import dataclass

from workstation.cli.later_settings import LATER_SETTINGS
from workstation.settings import Setting

_WORKING: tuple[Setting, ...] = (
    Setting("served_model_name", "list", (), "Names the API answers to; repeat or separate by commas."),
    Setting("revision", "text", None, "Branch, tag or commit on the hub."),
    Setting("download_dir", "text", None, "Where downloads go; Hugging Face's cache unless given."),
    Setting("hf_token", "text", None, "For gated models; HF_TOKEN does the same unseen by `ps`.", secret=True),
    Setting("load_format", "text", "auto", "dummy fills the shape with random weights, for measurement.",
            choices=("auto", "safetensors", "dummy")),
    Setting("dtype", "text", "auto", "Of weights and activations; auto is the checkpoint's (float32 on the CPU).",
            choices=("auto", "bfloat16", "float16", "float32", "half", "float")),
    Setting("quantization", "text", None,
            "fp8, int8, int4 (int4-g64, int4-g32: smaller groups) or nf4: quantises 16-bit weights while loading; a quantised "
            "checkpoint needs no flag.", ("-q",), choices=("fp8", "int8", "int4", "int4-g64", "int4-g32", "nf4")),
    Setting("kv_cache_dtype", "text", "auto", "fp8 keeps keys and values in a byte each, and holds twice the tokens; auto: the "
            "checkpoint's, as a rule the model's dtype, whose name forces it.",
            choices=("auto", "fp8", "fp8_e4m3", "bfloat16", "float16", "float32")),
    Setting("max_model_len", "length", None, "Tokens of prompt and output a sequence may hold (32k = 32,000; 32K = 32,768; "
            "auto: the model's window, shrunk to fit).", low=1),
    Setting("generation_config", "text", "auto", "Where default sampling comes from: auto (the model's folder) or vllm "
            "(none: the API's defaults).", choices=("auto", "vllm")),
    Setting("override_generation_config", "json", None, "Default sampling as JSON, over generation_config.json and "
            "models.toml."),
    Setting("device", "text", "auto", "auto, cuda, cuda:N or cpu. Only the demo is put on the CPU unasked."),
    Setting("seed", "int", 0, "Of requests that bring none.", high=2**63 - 1),
    Setting("num_threads", "int", None, "CPU threads of the engine; as many as cores unless given.", low=1, high=1024),
    Setting("gpu_memory_utilization", "float", 0.9, "Share of the card the engine may use.", low=0.01, high=1.0),
    Setting("kv_cache_memory_bytes", "length", None, "Exact size of the KV pool (8G = 8 GiB); overrides the share.",
            low=1, high=2**50),
    Setting("num_gpu_blocks_override", "int", None, "Exact number of KV blocks; overrides the share.", low=2),
    Setting("enable_prefix_caching", "bool", True, "Keep finished blocks and share equal prefixes."),
    Setting("max_num_seqs", "int", 256, "Sequences that run at once.", low=1, high=4096),
    Setting("max_num_batched_tokens", "length", None, "Token budget of a step. Unless given, 4096 on a card of 70 GiB or "
            "more (8192 offline, where no stream waits for a step to end), 2048 on others and the CPU.", low=1, high=2**20),
    Setting("enable_chunked_prefill", "bool", True, "Split long prompts over steps."),
    Setting("scheduling_policy", "text", "fcfs", "Who runs next.", choices=("fcfs", "priority")),
    Setting("max_num_queued_reqs", "int", 2048, "Waiting requests before the API answers 503.", low=1, high=10**6),
    Setting("async_scheduling", "bool", None, "Schedule a step while the one before runs; on a GPU unless given."),
    Setting("host", "text", "127.0.0.1", "Address to listen on. Beyond loopback a key is made unless one is given."),
    Setting("port", "int", 8000, "Port to listen on; 0 takes a free one.", high=65535),
    Setting("api_key", "list", (), "Key clients must send; repeat for several. WS_API_KEY is unseen by `ps`.",
            secret=True),
    Setting("allowed_origins", "list", (), "Web origins that may call the API from a browser."),
    Setting("chat_template", "text", None, "File with a Jinja chat template, instead of the model's."),
    Setting("tool_call_parser", "text", "auto", "How the model writes tool calls; auto reads it off the chat template, none "
            "leaves calls in the text."),
    Setting("reasoning_parser", "text", "auto", "How the model marks its thoughts; auto reads it off the chat template, none "
            "leaves them in the text."),
    Setting("pooling", "text", "auto", "Which hidden states /v1/embeddings takes: auto (what the folder's modules.json says, "
            "else last), last or mean.", choices=("auto", "last", "mean")),
    Setting("map_claude_models", "bool", True, "Let /v1/messages answer to every claude-… model id."),
    Setting("enable_auto_tool_choice", "bool", True, "Let the model choose to call tools.", only=(True,),
            why="a request without tools, or with tool_choice none, turns calls off"),
    Setting("enable_per_request_metrics", "bool", False, "Put vLLM's `metrics` object into answers of chat and completions."),
    Setting("metrics_prefix", "text", "ws", "Names in /metrics; vllm has those of vLLM, for its Grafana dashboard.",
            choices=("ws", "vllm")),
    Setting("show_text", "bool", False, "Show the ends of prompts and answers in a request's details on the dashboard."),
    Setting("allowed_hosts", "list", (), "Further Host names accepted on a loopback bind."),
    Setting("shutdown_timeout", "float", 30.0, "Seconds that requests in flight get after Ctrl-C or SIGTERM.",
            high=3600),
    Setting("access_log", "bool", False, "Log a line for each HTTP request."),
    Setting("enforce_eager", "bool", False, "Launch kernel by kernel, without CUDA graphs."),
    Setting("enable_prompt_tokens_details", "bool", True, "Report cached prompt tokens.", only=(True,),
            why="cached tokens are always reported"),
    Setting("disable_log_stats", "bool", False, "Log no figures: what this version always does; /metrics has them."),
)  # fmt: skip
SERVE_SETTINGS = _WORKING + LATER_SETTINGS


@dataclass(frozen=True, slots=True)
class RemovedFlag:
    """A flag old vLLM guides still show. `harmless` ones are accepted and answered with the sentence, others refused."""

    name: str
    sentence: str
    harmless: bool = False
    takes_value: bool = True

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


REMOVED_FLAGS: tuple[RemovedFlag, ...] = (
    RemovedFlag("swap_space", "preempted sequences are computed again, nothing is swapped to host memory", harmless=True),
    RemovedFlag("task", "ws serves text generation only; other tasks are refused by the API", harmless=True),
    RemovedFlag("use_v2_block_manager", "there is one block manager", harmless=True, takes_value=False),
    RemovedFlag("num_scheduler_steps", "scheduling overlaps with the GPU without it", harmless=True),
    RemovedFlag("num_lookahead_slots", "slots are planned per step", harmless=True),
    RemovedFlag("disable_log_requests", "requests are not logged", harmless=True, takes_value=False),
    RemovedFlag("preemption_mode", "preemption always recomputes", harmless=True),
    RemovedFlag("max_seq_len_to_capture", "graphs do not depend on the length of a sequence", harmless=True),
    RemovedFlag("guided_decoding_backend", "grammars are llguidance's, whatever the flag says", harmless=True),
    RemovedFlag("enable_reasoning", "thoughts are told apart from answers without it", harmless=True, takes_value=False),
    RemovedFlag("rope_scaling", "RoPE is read from the model's config.json; change it there"),
    RemovedFlag("rope_theta", "RoPE is read from the model's config.json; change it there"),
    RemovedFlag("calculate_kv_scales", "an FP8 KV cache has the checkpoint's scales, or none", takes_value=False),
    RemovedFlag("speculative_model", "speculative decoding has not landed"),
)

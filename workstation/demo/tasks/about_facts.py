"""What the demo model knows about `ws`: short, true answers. docs/architecture.md tells the same at length."""

from __future__ import annotations

# Term → what it is. Asked in every frame of about_ws.FRAMES.
DEFINITIONS: dict[str, str] = {
    "ws": "ws is an LLM server for one big GPU, with an OpenAI-compatible API.",
    "a block": "A block holds the keys and values of 16 tokens.",
    "a block table": "A block table lists the blocks of a sequence in order.",
    "a request": "A request is one prompt with its sampling parameters.",
    "a sequence": "A sequence is one sample of a request.",
    "a row": "A row is the fixed slot of a sequence in the GPU state.",
    "a step": "A step is one pass of the engine over a batch.",
    "the token budget": "The token budget is the number of tokens one step may compute.",
    "a chunk": "A chunk is a part of a prompt that is computed in one step.",
    "a KV group": "A KV group is a set of layers that share one paging rule.",
    "a plan": "A plan is a decision made before memory is touched.",
    "a snapshot": "A snapshot is what the dashboard draws.",
    "the scheduler": "The scheduler decides which tokens of which sequences each step computes.",
    "the block pool": "The block pool owns all KV blocks and counts their references.",
    "the model runner": "The model runner owns the weights and runs the model on a batch.",
    "the sampler": "The sampler turns logits into tokens.",
    "the engine": "The engine is the process that owns the GPU and runs the steps.",
    "paged KV": "Paged KV keeps the cache in blocks of 16 tokens, so that almost no memory is wasted.",
    "continuous batching": "Continuous batching lets requests join and leave the batch at every step.",
    "prefix caching": "Prefix caching reuses the blocks of a prompt that was computed before.",
    "chunked prefill": "Chunked prefill computes a long prompt in parts, so that others do not wait.",
    "preemption": "Preemption takes the blocks of a sequence back and recomputes it later.",
    "copy-on-write": "Copy-on-write copies a shared block only when a sequence writes to it.",
    "the KV cache": "The KV cache keeps the keys and values of tokens that were computed.",
    "prefill": "Prefill computes the tokens of a prompt.",
    "decode": "Decode computes one new token for each sequence.",
    "a CUDA graph": "A CUDA graph replays a recorded list of kernels with one launch.",
    "the prefix hash": "The prefix hash of a block covers its tokens and all tokens before it.",
    "tensor parallelism": "Tensor parallelism splits each layer over several GPUs.",
    "the memory plan": "The memory plan says how the GPU memory is divided, before any of it is taken.",
    "the demo model": "The demo model is a small chat model that ships with ws and runs on a CPU.",
    "a logit": "A logit is the score of a token before sampling.",
    "temperature": "Temperature makes sampling more random when it is high; 0 is greedy.",
    "top_p": "top_p keeps the likeliest tokens whose probabilities add up to p.",
    "top_k": "top_k keeps the k likeliest tokens.",
    "min_p": "min_p drops tokens less likely than p times the likeliest one.",
    "greedy decoding": "Greedy decoding always takes the likeliest token.",
    "a seed": "A seed makes the samples of a request repeatable.",
    "a stop string": "A stop string ends the answer when it appears in the text.",
    "beam search": "Beam search keeps the best few sequences at every step.",
    "logprobs": "Logprobs are the logarithms of the token probabilities.",
    "streaming": "Streaming sends each token as soon as it is there.",
    "the detokenizer": "The detokenizer turns tokens back into text, piece by piece.",
    "the chat template": "The chat template turns messages into one prompt.",
    "a kernel": "A kernel is a function that runs on the GPU.",
    "a twin": "A twin is the plain torch version of a Triton kernel.",
    "grouped-query attention": "In grouped-query attention several query heads share one key and value head.",
    "paged attention": "Paged attention reads keys and values from blocks, through a block table.",
    "a token": "A token is a piece of text with a number of its own.",
    "quantization": "Quantization stores weights in fewer bits.",
    "throughput": "Throughput is the number of tokens per second.",
    "latency": "Latency is the time a user waits.",
    "a tool call": "A tool call is JSON that names a function and its arguments.",
}

# Ways to ask → answer.
QUESTIONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("how many tokens are in a block", "how large is a block", "what is the block size"), "A block has 16 tokens."),
    (("which port does ws use", "what is the default port of ws", "on which port does ws listen"), "ws listens on port 8000."),
    (
        ("which host does ws bind to", "what is the default host of ws", "on which address does ws listen"),
        "ws listens on 127.0.0.1.",
    ),
    (("how do I start the server", "how do I serve a model", "which command starts ws"), "Type: ws serve MODEL"),
    (("how do I serve the demo model", "how do I start the demo", "which command serves the demo"), "Type: ws serve demo"),
    (("how do I chat with a model", "which command opens a chat", "how can I chat in the terminal"), "Type: ws chat"),
    (("how do I stop a server", "which command stops the server", "how can I stop ws"), "Type: ws stop"),
    (("how do I list running servers", "which command shows running servers", "how can I see what is running"), "Type: ws ps"),
    (("how do I list the models", "which command lists the models", "how can I see all models"), "Type: ws models"),
    (
        ("how do I evaluate the demo", "which command scores the demo model", "how can I test the skills of the demo"),
        "Type: ws eval demo",
    ),
    (
        ("how do I measure throughput", "which command measures throughput", "how can I benchmark throughput"),
        "Type: ws bench throughput MODEL",
    ),
    (
        ("how do I measure latency", "which command measures latency", "how can I benchmark latency"),
        "Type: ws bench latency MODEL",
    ),
    (
        (
            "how do I generate text without a server",
            "which command generates text once",
            "how can I generate offline in the terminal",
        ),
        "Type: ws generate",
    ),
    (("which API does ws speak", "what API does ws offer", "with which API is ws compatible"), "ws speaks the OpenAI API."),
    (
        ("where is the chat endpoint", "what is the path of the chat API", "which route serves chat"),
        "Chat is at /v1/chat/completions.",
    ),
    (
        ("where is the completions endpoint", "what is the path of the completions API", "which route serves completions"),
        "Completions are at /v1/completions.",
    ),
    (
        ("where are the metrics", "what is the path of the metrics", "which route shows metrics"),
        "Metrics are at /metrics, in the Prometheus format.",
    ),
    (
        ("where is the health check", "what is the path of the health check", "which route shows health"),
        "The health check is at /health.",
    ),
    (
        ("where is the list of models in the API", "which route lists models", "what is the path of the model list"),
        "The models are at /v1/models.",
    ),
    (
        ("where can I tokenize text", "which route tokenizes text", "what is the path for tokenizing"),
        "Text is tokenized at /tokenize.",
    ),
    (
        ("does ws run without a GPU", "can ws run on a CPU", "do I need a GPU for the demo"),
        "Yes, the demo model runs on a CPU; large models need an NVIDIA GPU.",
    ),
    (("which GPUs does ws support", "what kind of GPU does ws need", "which graphics cards work"), "ws supports NVIDIA GPUs."),
    (
        ("which models does ws support", "which architectures can ws serve", "what model families work with ws"),
        "ws serves Llama, Mistral, Qwen2 and Qwen3 models.",
    ),
    (
        ("in which language is ws written", "what is ws written in", "which language is the code of ws"),
        "ws is written in Python, with kernels in Triton.",
    ),
    (
        ("which license does ws have", "what is the license of ws", "under which license is ws"),
        "ws has the Apache-2.0 license.",
    ),
    (
        ("which Python version does ws need", "what Python do I need", "which Python works with ws"),
        "ws needs Python 3.11 or newer.",
    ),
    (
        ("what happens when the client disconnects", "what happens when a client goes away", "what if the client hangs up"),
        "The request is aborted at the next step and its blocks go back to the pool.",
    ),
    (
        ("what happens when memory runs out", "what happens when no block is free", "what if the cache is full"),
        "A younger sequence is preempted and recomputed later.",
    ),
    (
        ("which sequence is never preempted", "what sequence cannot be preempted", "who is safe from preemption"),
        "The oldest running sequence is never preempted.",
    ),
    (
        (
            "what happens to a request that can never fit",
            "what happens to a prompt that is too long",
            "what if a prompt is too long",
        ),
        "It is refused at once with status 400.",
    ),
    (
        ("how does a request end", "in which ways can a request end", "what are the terminal events"),
        "Every request ends exactly once: finished, aborted or error.",
    ),
    (("which process owns the GPU", "who owns the GPU", "what process holds the GPU"), "The engine process owns the GPU."),
    (("which process handles HTTP", "who handles HTTP", "what process answers HTTP"), "The API process handles HTTP."),
    (
        ("how do the processes talk", "how does the server talk to the engine", "what connects the two processes"),
        "They send msgpack messages over a unix socket.",
    ),
    (("does ws use pickle", "is pickle used", "are pickle files loaded"), "No, ws never uses pickle."),
    (
        ("which weight format does ws load", "what file format are the weights", "which files hold the weights"),
        "ws loads safetensors files.",
    ),
    (
        ("does ws run remote code", "is remote code executed", "can a model folder run its own code"),
        "No, ws never runs code from a model folder.",
    ),
    (
        ("what is the order of the layers", "how do the layers depend on each other", "which way do the imports point"),
        "cli, server, engine, model, kernels.",
    ),
    (
        ("what does the cli import", "what may the cli use", "when does the cli import torch"),
        "The cli imports inside its commands, so that ws --help is fast.",
    ),
    (
        ("which blocks are evicted first", "what is evicted from the cache", "how are cached blocks evicted"),
        "The least recently used block goes first, from the tail of its chain.",
    ),
    (
        (
            "how much GPU memory does ws use",
            "what share of the GPU memory is used",
            "what is the default GPU memory utilization",
        ),
        "ws uses 90 percent of the GPU memory unless told otherwise.",
    ),
    (
        ("which unit does ws use for sizes", "in which unit are sizes shown", "what unit is memory shown in"),
        "All sizes are shown in GiB.",
    ),
    (
        ("does ws use torch.compile", "is torch.compile used", "why is there no torch.compile"),
        "No, because a cold start must take seconds.",
    ),
    (
        ("which scheduling policies are there", "what scheduling policies does ws know", "how are requests ordered"),
        "There are two policies: fcfs and priority.",
    ),
    (
        ("what comes first in a batch", "are decodes or prefills first", "how is the budget filled"),
        "Decodes come first, then prefill chunks fill the budget.",
    ),
    (
        ("how many parameters does the demo have", "how big is the demo model", "what is the size of the demo model"),
        "The demo model has about 7 million parameters.",
    ),
    (
        ("how many layers does the demo have", "what is the depth of the demo model", "how deep is the demo model"),
        "The demo model has 8 layers.",
    ),
    (
        (
            "what is the context length of the demo",
            "how long is the context of the demo model",
            "how many tokens can the demo read",
        ),
        "The demo model reads up to 8192 tokens.",
    ),
    (
        (
            "what is the vocabulary of the demo",
            "how many tokens does the demo know",
            "how large is the vocabulary of the demo model",
        ),
        "The demo model knows 4096 tokens.",
    ),
    (
        ("can I use the openai client", "does the openai package work", "how do I use the openai client"),
        "Yes, set base_url to http://127.0.0.1:8000/v1.",
    ),
    (
        ("how do I use ws in Python", "how do I use ws offline", "is there a Python class"),
        "Write: from workstation import LLM, SamplingParams",
    ),
    (("how do I protect the server", "how do I set an API key", "which flag sets the key"), "Start the server with --api-key."),
    (
        ("how do I limit the context", "which flag sets the context length", "how do I set the context length"),
        "Use --max-model-len.",
    ),
    (
        ("how do I limit the batch", "which flag limits the sequences", "how do I set the number of sequences"),
        "Use --max-num-seqs.",
    ),
    (
        ("how do I set the token budget", "which flag sets the token budget", "how do I change the token budget"),
        "Use --max-num-batched-tokens.",
    ),
    (("how do I choose the data type", "which flag sets the data type", "how do I set the dtype"), "Use --dtype."),
    (
        ("how do I turn prefix caching off", "which flag disables prefix caching", "how do I disable the prefix cache"),
        "Use --no-enable-prefix-caching.",
    ),
    (("how do I run the tests", "which command runs the tests", "how are the tests started"), "Type: make test"),
    (
        ("how do I install and start the demo", "which make target starts the demo", "what is the quickest start"),
        "Type: make demo",
    ),
    (
        ("what happens when the engine dies", "what if the engine crashes", "is a dead engine restarted"),
        "The engine is restarted, at most 3 times in 60 seconds.",
    ),
    (
        ("what happens with NaN logits", "what if the logits are not finite", "what happens when logits are NaN"),
        "That request ends with an error; the others go on.",
    ),
    (
        ("what is the name of the package", "how is the distribution called", "what is ws called on disk"),
        "The package is called workstation-llm.",
    ),
    (
        ("where are the models listed", "which file lists the models", "what file holds the catalogue"),
        "The models are listed in models.toml.",
    ),
    (
        ("which model is ws best compared with", "what is ws like", "which server does ws compete with"),
        "ws competes with vLLM.",
    ),
)

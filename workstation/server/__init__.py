"""The OpenAI-compatible HTTP API. Imports neither torch nor transformers."""

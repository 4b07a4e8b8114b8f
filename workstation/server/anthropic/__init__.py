"""/v1/messages: Anthropic's dialect, translated into the one request behind all of them and back."""

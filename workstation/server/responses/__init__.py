"""/v1/responses: OpenAI's newer dialect, translated into the one request behind all of them and back."""

"""Structured output: what a request may ask for, as grammars for llguidance, which is imported only when needed. No torch."""

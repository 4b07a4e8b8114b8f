"""Tool calls and reasoning read out of a model's text, whatever way it is cut. Imports no torch and no model."""

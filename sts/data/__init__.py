"""Example sets and prompts; knows no model but a tokenizer."""

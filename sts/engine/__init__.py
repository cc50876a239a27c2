"""Runs and trains models; knows ids, texts and tensors; no run, no page."""

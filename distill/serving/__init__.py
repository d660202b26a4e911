"""Answering requests with an exported student. Nothing in here needs torch or transformers."""

"""Readers of training streams and evaluation sets."""

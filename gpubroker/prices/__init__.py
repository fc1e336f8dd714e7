"""Prices: poll the providers, keep what they said as spans, read the price book."""

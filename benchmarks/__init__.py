"""Speeds and sizes that the project promises, each measured against its baseline in the same run."""

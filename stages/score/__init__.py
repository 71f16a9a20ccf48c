"""Scoring and pairing: candidates in, rewards and then chosen/rejected pairs out, every prompt with one fate."""

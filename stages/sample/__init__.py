"""Sampling: prompts in, candidate responses with their token ids and log-probs out. The only home of vLLM."""

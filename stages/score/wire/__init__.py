"""Rewards over the wire: reward servers and chat models that judge, asked politely and never twice for the same."""

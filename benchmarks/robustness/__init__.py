"""DPO, DPOP and MinorDPO where DPO is said to break, on fixed pair tables and on policy.

    python -m benchmarks.robustness

Offline, in one process, without Ray: `stages` does the sampling, scoring, pairing and updating. A finished cell is a
line in a file, so that a stopped study carries on; ``docs/robustness.md`` is written from these lines alone.
"""

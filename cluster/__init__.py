"""Where a step runs: Ray actors, Ray Train workers, resources. Knows callables and results, not preference data."""

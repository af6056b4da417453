"""Looking at runs: what other methods would have done, which thresholds fit, and a report of it all."""

"""Analyses of finished or running training runs: `inspect` and `calibrate` replay tokens, `report` draws runs."""

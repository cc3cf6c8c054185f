"""Scoring's parts: log-likelihood, generation, statistics and the harness bridge."""

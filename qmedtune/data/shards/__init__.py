"""Corpora beyond one machine: the hygiene of a recipe over shards, as blocks of datatrove pipelines."""

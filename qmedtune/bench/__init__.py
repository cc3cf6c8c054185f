"""`qmedtune bench`: each contender in its own process, resumable rows, ratios from one run."""

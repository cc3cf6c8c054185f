"""What there is to see of runs: a list of them, and a live local page of each.

Everything is read from the run folders; nothing here writes into one, and no run knows that it is watched.
"""

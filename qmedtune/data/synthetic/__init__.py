"""Data that is made here: the built-in world, its labelled notes, and canaries."""

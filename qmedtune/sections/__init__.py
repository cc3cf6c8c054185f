"""The sections of a recipe as frozen models: each key with its type, its default and, below it, what it is for."""

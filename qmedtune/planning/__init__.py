"""What a recipe will cost before it runs: tokens, steps, memory, disk and time; nothing here loads weights."""

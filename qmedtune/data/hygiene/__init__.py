"""What is done to records before they are training text: cleaning, identifiers, duplicates, benchmarks."""

"""Public benchmarks: their rows in, their official figures out. A file for each."""

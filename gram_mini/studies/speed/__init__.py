"""Speed and memory, measured and on paper. See README.md here."""

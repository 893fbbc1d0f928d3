"""A judge in other tools: model folders, training loops, official files. See README.md here."""

"""A judge in other tools: model folders, a reward for TRL, official files. See README.md here."""

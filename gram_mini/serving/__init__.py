"""A judge in other tools: an ordinary model folder, a reward function for TRL, official data files. See README.md here."""

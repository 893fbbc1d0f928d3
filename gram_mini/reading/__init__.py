"""Files, folders and hub data sets in, pairs out. See README.md here."""

"""Help desk questions in plain English, with answers of known quality: a small data set."""

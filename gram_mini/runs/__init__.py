"""What surrounds a run and is no part of the lesson: options, folders, checkpoints, processes, logs. See README.md here."""

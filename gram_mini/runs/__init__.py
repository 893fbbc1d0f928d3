"""Everything around a run: options, folders, checkpoints, processes, logs. See README.md here."""

"""A judge in other tools: model folders, servers, training loops. See README.md here."""

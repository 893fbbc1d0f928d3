"""The reward models that the paper compares with: scalar heads, frozen models, a text loss. See README.md here."""

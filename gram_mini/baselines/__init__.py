"""The paper's baselines: scalar heads, frozen models, a text loss. See README.md here."""

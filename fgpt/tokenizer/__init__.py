"""Text <-> token ids; README.md lists the modules."""

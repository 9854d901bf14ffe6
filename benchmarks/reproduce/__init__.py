"""Studies of the claims of the sources: see docs/reproduction.md."""

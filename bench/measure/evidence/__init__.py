"""Evidence that a strategy is active, read from tensors and collectives; what each check means: docs/evidence.md."""

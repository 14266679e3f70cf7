"""Data: where it comes from, how it is checked and read, and the synthetic sets."""

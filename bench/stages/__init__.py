"""The stages: an algorithm each."""

"""Images: what goes into one, building it, checking it, running trials in it. Torch-free."""

"""Starting ranks, supervising them, and leaving a record of every trial. Torch-free."""

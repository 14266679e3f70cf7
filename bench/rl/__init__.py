"""Pure tensor arithmetic of reinforcement learning."""

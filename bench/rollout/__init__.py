"""Rollout engines: how a policy generates."""

"""Federated planning: bounded summaries -> nnU-Net fingerprint -> stock planner -> plans with a `fedharm` section."""

"""Demo data and simulated site effects."""

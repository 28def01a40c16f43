"""The experiment matrix of a multi-site dataset: central, federated and local trainings, and what they answer together."""

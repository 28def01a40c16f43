"""Secure sums of a federation: the Flower messages around the protocol of the privacy room."""

"""Dice, HD95 and pictures, per site."""

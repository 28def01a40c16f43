"""Attacks on our own models and mechanisms, run at a site by the site: what can be found out, and what a claimed epsilon allows.

An attack that fails proves nothing; one that succeeds beyond a claim refutes it. Every bound here is a lower one.
"""

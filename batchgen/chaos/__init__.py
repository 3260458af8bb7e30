"""Faults on purpose: named crash points, and real kills against a user's own store."""

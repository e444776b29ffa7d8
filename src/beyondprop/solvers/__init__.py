"""Solvers: how each stage comes to produce what it should have produced."""

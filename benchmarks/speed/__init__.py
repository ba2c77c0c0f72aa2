"""Paired timings against plain loops."""

"""Choosing real images by their features."""

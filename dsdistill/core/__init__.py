"""Foundations without any notion of distillation: settings, randomness, storage, registry."""

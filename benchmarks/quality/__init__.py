"""Test accuracies of distilled sets."""

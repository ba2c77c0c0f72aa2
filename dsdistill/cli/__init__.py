"""The command line: a few verbs over the library's functions."""

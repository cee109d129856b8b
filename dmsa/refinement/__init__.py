"""Refining pseudo masks that lie in a folder: reading them, refining them, scoring before and after."""

"""Data sets; every one yields the same sample dict."""

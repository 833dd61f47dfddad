"""Command line, local web page and HTTP service."""

"""Layers and whole problems as one Python file that needs torch and a compiler alone."""

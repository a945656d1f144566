"""Whole networks: which of their convolutions convgen computes, and what that brings."""

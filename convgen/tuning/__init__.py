"""Races of schedules on this machine."""

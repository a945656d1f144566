"""What the families of gathers (fprop and dgrad) have in common."""

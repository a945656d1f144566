"""What the commands of ``convgen`` do."""

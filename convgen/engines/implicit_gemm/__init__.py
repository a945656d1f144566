"""Hopper's tensor cores on channels that lie side by side: TF32 and 16 bits, any layout."""

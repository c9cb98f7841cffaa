"""The demonstration: real samples through the sample repository, checked and drawn."""

"""Real servers the tests compare with."""

"""What the v2 protocol offers besides the form of a message: plain data in and out."""

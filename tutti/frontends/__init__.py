"""What all protocols share: who may call what, how large a request may be, and what is held for it."""

"""How commands read what people type, and tell them how it goes."""

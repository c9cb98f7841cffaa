"""Which request is executed when, with which others, and where. Knows no backend and no protocol."""

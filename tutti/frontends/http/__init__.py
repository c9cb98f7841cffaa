"""The v2 protocol over HTTP/1.1."""

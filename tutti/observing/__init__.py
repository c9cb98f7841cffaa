"""What is counted, logged and traced of requests. Knows no model, and no protocol."""

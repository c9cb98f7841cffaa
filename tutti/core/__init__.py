"""What flows through the server, and what every process needs of its machine. Imports nothing of the others."""

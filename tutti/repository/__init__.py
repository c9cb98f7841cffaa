"""Models on disk: folders, configurations, and what these say of requests. Loads nothing."""

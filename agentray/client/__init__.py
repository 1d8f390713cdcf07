"""What callers import: handles to session actors, and the HTTP client."""

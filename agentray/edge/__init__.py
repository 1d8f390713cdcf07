"""The region router: a stateless process in front of the regions."""

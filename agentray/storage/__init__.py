"""The stores: PostgreSQL, Redis, objects and vectors, each behind a protocol."""

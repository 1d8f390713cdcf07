"""Sessions as actors: state, runtime, journal, ownership and recovery."""

"""What a model is shown of a session's past: window, compaction and recall."""

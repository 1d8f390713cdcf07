"""Run tools: scheduling, workers and the sandbox."""

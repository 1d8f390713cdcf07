"""Run code that nobody trusts, within quotas, and get its output back whatever it does."""

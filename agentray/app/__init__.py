"""Make a running system out of settings: start everything, watch it, bring it back, end it."""

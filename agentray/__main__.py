"""Let ``python -m agentray`` do what the command does."""

from agentray.cli import main

if __name__ == "__main__":
    main()

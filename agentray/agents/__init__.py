"""What agents are: their instructions, model, tools and versions."""

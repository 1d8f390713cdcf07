"""The region's door: OpenAI's and agentray's own routes over HTTP."""

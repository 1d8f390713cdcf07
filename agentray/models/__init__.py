"""Call models: catalog, client, routing, and the servers that agentray hosts itself."""

"""Share a machine: serve a span of a model's blocks to the swarm. Knows nothing about tokens, text or sampling."""

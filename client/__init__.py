"""Use the swarm: a Hugging Face model whose blocks are remote. Knows nothing about serving."""

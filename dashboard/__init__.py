"""A swarm's public health page: who serves what, since when, and what is missing. No login, no IP addresses."""

"""`python -m client api`: the swarm behind the HTTP interface that OpenAI's clients speak.

A request becomes one or more answers; each is an unmodified `generate` of the same model in a thread of its own, and
the swarm and the LM head compute those under way together. Nothing is kept between two requests.
"""

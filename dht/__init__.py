"""Who serves what: signed, expiring records in a hivemind Kademlia DHT. Discovery only; activations never pass here."""

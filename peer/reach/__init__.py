"""How others reach this peer: directly, as they themselves say, or through a volunteer that relays."""

"""`python -m dht`."""

from dht.cli import main

if __name__ == "__main__":
    main(prog_name="python -m dht")

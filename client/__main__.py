"""`python -m client`."""

from client.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m client")

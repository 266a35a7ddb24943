"""`python -m peer`."""

from peer.cli import cli

if __name__ == "__main__":
    cli(prog_name="python -m peer")

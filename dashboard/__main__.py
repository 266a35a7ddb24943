"""`python -m dashboard`."""

from dashboard.cli import serve

if __name__ == "__main__":
    serve(prog_name="python -m dashboard")

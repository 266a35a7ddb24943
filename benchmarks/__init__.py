"""What Potluck costs and what it saves, measured on one machine in one run: `python -m benchmarks list`."""

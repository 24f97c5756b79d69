"""Makes batches of orders to run the pipeline on: `python -m generator --help`."""

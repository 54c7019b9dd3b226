"""MLflow, kept away from the search: a process of its own replays the ledger into it.

tracker.py starts, stops and finishes that process; replay.py remembers how far it got; generations.py turns a
ledger into metrics; mlflow_store.py is the only file that knows MLflow; overview.py writes the Markdown pages.
"""

STORE_FILE, ARTIFACTS = "mlflow.db", "mlartifacts"
"""Of a store inside a run's folder: its database, and the folder of artifacts beside it."""

"""Our own load_batch, as a peer among peers: from opening the connection to the commit."""

import json
import logging
import os
import resource
import sys
import time
from pathlib import Path

import psycopg

sys.path.append(str(Path(__file__).resolve().parents[2] / "dags"))
from batch_load import load_batch

logging.disable()  # that COPY refuses the file is no news here
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

started = time.perf_counter()
with psycopg.connect(os.environ["BENCH_URL"]) as conn:
    path = Path(os.environ["BENCH_FILE"])
    load_batch(conn, table="raw.orders", batch_id="bench", path=path, max_rejects=sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - started, "before_mib": before}))

"""Our own generator, with its vocabulary made anew and its file on disk in the end."""

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from generator.orders import generate_orders

rows = int(os.environ["BENCH_ROWS"])

started = time.perf_counter()
generate_orders(Path(os.environ["BENCH_FILE"]), rows=rows, updated_at=datetime(2026, 1, 2, tzinfo=UTC))
print(json.dumps({"seconds": time.perf_counter() - started}))

"""What a log of this program holds of the lines that libraries write."""

import subprocess
import sys

ASK = """
from pipeline.logs import configure_logs
configure_logs()
import urllib3
pool = urllib3.PoolManager(retries=urllib3.Retry(2, backoff_factor=0))
try:
    pool.request("GET", "http://127.0.0.1:9/")
except urllib3.exceptions.MaxRetryError:
    pass
"""


def test_attempts_at_a_server_that_is_away_fill_no_log():
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True)
    assert done.stderr == ""

"""One thread for each test process: the suite runs several of them side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

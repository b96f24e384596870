"""Networks and data that tests of other folders made up."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "train"))

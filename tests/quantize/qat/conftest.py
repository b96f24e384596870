"""The graphs that the tests of lint draw serve here as well."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "lint"))
sys.path.append(str(Path(__file__).parents[1] / "train"))

"""dtrain: training that survives."""

import dtrain.ahead  # noqa: F401 - before all that follows
from dtrain.config import Best, Config
from dtrain.launch import launch
from dtrain.training.data import Data
from dtrain.training.run import Run
from dtrain.training.step import Step
from dtrain.training.tokens import Tokens

__all__ = ["Best", "Config", "Data", "Run", "Step", "Tokens", "launch"]
__version__ = "0.1.0"

"""dtrain: training that survives."""

import dtrain.ahead  # noqa: F401 - before all that follows
from dtrain.config import Config
from dtrain.criteria import Best, EarlyStop, Guards
from dtrain.launch import launch
from dtrain.training.data import Data
from dtrain.training.ema import EMA
from dtrain.training.evaluate import Mean
from dtrain.training.fit import fit
from dtrain.training.run import Run
from dtrain.training.step import Step
from dtrain.training.tokens import Tokens

__all__ = ["EMA", "Best", "Config", "Data", "EarlyStop", "Guards", "Mean", "Run", "Step", "Tokens", "fit", "launch"]
__version__ = "0.1.0"

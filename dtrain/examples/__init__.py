"""Whole programs that train something with dtrain, each in one file that is read top to bottom."""

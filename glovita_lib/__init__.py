"""glovita: train, evaluate and read out vision models for whole-sample prediction."""

__version__ = "0.1.0"

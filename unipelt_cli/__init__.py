"""Fine-tune pretrained encoders on few labelled examples with gated submodules."""

__version__ = "0.1.0"

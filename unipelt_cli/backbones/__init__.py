"""Pretrained encoders: where things are in each architecture, finding and reading one safely."""

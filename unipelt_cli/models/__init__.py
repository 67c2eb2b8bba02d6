"""Backbone, method and head as one model: building, batching, scoring, sharing."""

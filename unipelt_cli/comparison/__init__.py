"""Finished runs side by side: groups over seeds, intervals, paired tests, published scores."""

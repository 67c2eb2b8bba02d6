"""What heads read and learn from: their start, frozen features, the loss of a batch."""

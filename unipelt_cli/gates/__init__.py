"""What a run's gates tell: by layer, class, example and epoch, closed one by one, or constant."""

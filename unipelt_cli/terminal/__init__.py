"""What a person sees and types: the only package that imports rich."""

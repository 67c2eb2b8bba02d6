"""Many runs: a grid of cells, the engines that train them, and the search for a method."""

"""The one path from the experts of a layer to its weight file: steps, then writing."""

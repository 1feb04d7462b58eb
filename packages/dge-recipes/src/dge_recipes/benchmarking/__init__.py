"""Speed of a DGE model against the dense model of the same shape, and how it is reported."""

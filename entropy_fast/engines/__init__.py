"""How X, Y and the influence kernel K are obtained."""

"""Writing the residual stream: operators, gates, steering, replacement. What comes of it is measured elsewhere."""

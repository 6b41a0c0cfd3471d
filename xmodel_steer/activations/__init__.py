"""Reading the residual stream: capture, moments in one pass, stores on disk, several processes. Nothing is written to it."""

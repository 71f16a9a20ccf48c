"""``prefloop doctor``: whether a run would work here, looked at part by part, each red line with its fix."""

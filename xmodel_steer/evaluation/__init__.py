"""What a model does under an intervention: behaviours, scorers, judges, damage, checks of a map. No recipe chooses anything here."""

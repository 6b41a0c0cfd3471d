"""The whole recipe: `transfer`, its arms, the result and its verdict, and how a result is saved. No figure is drawn here."""

"""Checks of constraints before the engine gets them: each is enforced, and compiled within a budget."""

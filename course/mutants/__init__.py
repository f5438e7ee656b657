"""Plausible mistakes, one module per assignment: {"file:function": [(text, its replacement)]}."""

"""Results of evaluations, tables and figures."""

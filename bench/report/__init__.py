"""From records to tables, verdicts, figures and one page. Pure functions; torch-free."""

"""From records to tables, plots and pages. Imports no torch."""

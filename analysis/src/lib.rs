//! Evaluation, tables, plots and the report.

"""Verbs of the command line, a module for each, and what they share; evaluate and table, prepare, and doctor stand with their
subjects, in kit.evaluation, kit.prepare and kit.planning."""

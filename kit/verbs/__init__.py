"""The verbs of the command line, a module for each: thin functions over the rest, which Python calls as well."""

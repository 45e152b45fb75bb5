"""The flows: when each stage runs, and what happens when one does not end well."""

"""From recipe text to a checked Recipe: strict YAML with line numbers, suggestions and cross-checks."""

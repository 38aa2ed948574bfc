"""The pages of the documentation, and the code that writes the generated pages. Not shipped."""

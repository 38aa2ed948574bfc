"""The pages of the documentation, and the code that writes the generated ones. Not shipped."""

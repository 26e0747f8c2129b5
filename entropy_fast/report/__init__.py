"""How a result is shown: a table on the terminal, a picture, and the doctor's checklist."""

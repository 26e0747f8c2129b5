"""Side-by-side measurements. Each checks the result before it prints a speed."""

"""The objectives: one pure function and one parameter class a file; `registry` lists them."""

"""Several trainings compared: what is trained and judged how (`matrix`), and what follows from it (`findings`)."""

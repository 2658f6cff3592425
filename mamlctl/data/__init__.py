"""Where tasks come from: data sets, their class splits, and the draw of task number i."""

"""Columns of the int32 work tables that the kernels stream through. `lower_q` and `lower_kv` write these columns.

Every table is row-major; a name is the offset of a column from the start of its row, `…_FIELDS` the number of columns. A column
called a range takes two numbers, begin and end, that index another table. "Sorted" rows or keys go through the plan's
permutation tables `rows` and `keys`: an index into these is a *place* (rows) or a *slot* (keys).
"""

import triton.language as tl

# A work item of the forward and the dq pass: BLOCK_M rows of one head, one program.
Q_BATCH = tl.constexpr(0)
Q_HEAD = tl.constexpr(1)
Q_FIRST_ROW = tl.constexpr(2)  # a row, or a place where Q_SORTED is 1
Q_NUM_ROWS = tl.constexpr(3)
Q_TILE_ROW = tl.constexpr(4)  # the first row's index within the plan's tile, by which masks are addressed
Q_SORTED = tl.constexpr(5)
Q_WHOLE = tl.constexpr(6)  # range of whole key blocks in natural order
Q_WHOLE_SORTED = tl.constexpr(8)  # range of whole key blocks in sorted order
Q_MASKED = tl.constexpr(10)  # range of masked key blocks
Q_POINTS = tl.constexpr(12)  # range of single pairs: gathered keys
Q_PARTIAL = tl.constexpr(14)  # split-K: index of the partial result, -1 = the rows are in one part
Q_FIELDS = tl.constexpr(15)

# A work item of the dk/dv pass: BLOCK_N keys of one key head, one program. One row of ranges follows for each query head.
K_BATCH = tl.constexpr(0)
K_HEAD = tl.constexpr(1)
K_FIRST_KEY = tl.constexpr(2)  # a key, or a slot where the launch has sorted keys
K_NUM_KEYS = tl.constexpr(3)
K_PARTIAL = tl.constexpr(4)  # as Q_PARTIAL
K_FIELDS = tl.constexpr(5)
R_WHOLE = tl.constexpr(0)  # range of row blocks that see all keys of the block
R_MASKED = tl.constexpr(2)  # range of masked row blocks
R_POINTS = tl.constexpr(4)  # range of single pairs: gathered rows
R_FIELDS = tl.constexpr(6)

# A masked block. The first five columns are the same in both passes; `allowed_pairs` reads the mask.
B_FIRST = tl.constexpr(0)  # first key (forward, dq) or row (dk/dv) of the block; -1 - its slot or place where sorted
B_LO = tl.constexpr(1)  # the run of keys that the block was cut from: its begin and end, counted from the block's first key
B_HI = tl.constexpr(2)
B_BOUNDS = tl.constexpr(3)  # offset in `data` of the row bounds, -1 = none
B_BITS = tl.constexpr(4)  # offset in `data` of the bits, -1 = none
B_FIELDS = tl.constexpr(5)
# A row block of the dk/dv pass, whole or masked, has two columns more.
B_NUM_ROWS = tl.constexpr(5)
B_TILE_ROW = tl.constexpr(6)  # as Q_TILE_ROW
ROW_BLOCK_FIELDS = tl.constexpr(7)

# Rows (or keys) that were split: where their partial results are, and where the merged result goes.
M_BATCH = tl.constexpr(0)
M_HEAD = tl.constexpr(1)
M_FIRST = tl.constexpr(2)
M_COUNT = tl.constexpr(3)
M_SORTED = tl.constexpr(4)
M_PARTIAL = tl.constexpr(5)  # the first of M_PARTS consecutive partial results
M_PARTS = tl.constexpr(6)
M_FIELDS = tl.constexpr(7)

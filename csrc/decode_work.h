// Scheduling of decoding: units (the rows of one key head over one list of slots) are split into work items over their keys,
// run by threads, and merged by (maximum, sum).
#pragma once

#include <cstdint>
#include <vector>

#include "decode.h"

namespace farlight {

// The rows first_row … first_row + rows - 1 of the output over `count` slots of one key head.
struct DecodeUnit {
  const KeyPage* pages;
  int32_t page_shift;
  KeyType type;
  int64_t head;
  int64_t first_row, rows;
  const int32_t* slots;  // (count,) or null: slots first, first + 1, …
  int64_t first, count;
  int64_t masks;  // index of the first row's mask in DecodeSchedule::masks; -1: every row sees every listed slot
  const int64_t* position;  // of each slot's key, read for score terms only; null: slot s holds position s
};

// The output of all units.
struct DecodeOutput {
  KeyType type;  // also that of the queries
  void* out;   // (rows, dim) contiguous
  float* lse;  // (rows,) or null
};

// Units and the memory they point into, reused from call to call by a thread.
struct DecodeSchedule {
  std::vector<DecodeUnit> units;
  std::vector<const uint8_t*> masks;
  std::vector<float> queries;  // (rows, dim)
  float factor;                // scale * log2(e)
  DecodeTerms terms;
  std::vector<RowTerms> row_terms;  // (rows,); empty: scores have no terms
  std::vector<float> sinks;         // (rows,): a key of this score and value 0 for each row; empty: none

  void clear() { units.clear(), masks.clear(); }
  // Computes every unit and writes its rows.
  void run(const DecodeKernels& kernels, int64_t dim, const DecodeOutput& output, int threads);

 private:
  struct Part {
    int64_t unit, first, count, pointer;  // pointer: of its first row in `pointers_`
  };
  void split(int64_t dim);

  std::vector<Part> parts_;
  std::vector<float> partial_;
  std::vector<float*> pointers_;
  std::vector<const float*> query_rows_;
};

int64_t bytes_of(KeyType type);

}  // namespace farlight
